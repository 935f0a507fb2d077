"""Fed-SB: only an r × r matrix between two resting factors is trained and sent.

(Singhal et al., 2025, arXiv 2502.15371)

The change of weight is U R V with U (m × r) and V (r × n) the same for all, so that the mean of the R_k gives the mean
of the products: exact, and r² values a module whatever its size.

The paper takes U and V from a singular value decomposition of the first gradient of full fine-tuning, at one place.
Here no site has everybody's data, no gradient of a whole weight leaves a site, and m × n matrices are never formed. So
the first round is one of ordinary LoRA: everybody trains from the seeded start and sends A and B, as in FedIT. The
server takes the singular components of Σ p_k B_k A_k, which is what the clients' first steps add up to, and broadcasts
them once. Where this deviates from the paper:

- the subspace is that of a round of LoRA steps of all clients, not that of one full gradient;
- what round 1 has learnt is merged for good (the paper only initialises from its gradient), and R begins at zero, where
  the paper begins at the singular values;
- V has unit rows, as in the paper, and U columns of length `scale`, by which a step of R moves the weights further.

With keep = "leading" the r leading components are broadcast and what lies beyond them is lost in round 1, once; every
later round is exact. With "all" round 1 is exact too, and its broadcast has the sum of all ranks, as FLoRA's has in
every round.

A client of lower rank q trains the first q rows of R: its adapter is the first q columns of U with those rows between
them and V. It uses the other rows as they are, so Σ p_k R_k is exact for unequal ranks as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedloom.compress.entries import to_dense
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraPair, LoraState, core_matrix, module_of
from fedloom.methods.method import (
    CORE,
    FROZEN,
    Aggregate,
    Context,
    Entries,
    Facts,
    Method,
    State,
    Update,
    both_factors,
)
from fedloom.methods.shared.averaging import code_dense, dense_entries, product_sums, send_factors, weighted_mean
from fedloom.methods.shared.components import merge_increment, read_pairs
from fedloom.methods.shared.whole import adopt_whole, whole_rank

Keep = Literal["leading", "all"]
Core = Callable[[State], LoraState]


def fed_sb(*, keep: Keep = "leading", scale: float = 16.0) -> Method:
    """keep: what of round 1 is merged, its r leading components or all of them; scale: see the module."""
    if not scale > 0:
        raise ConfigError(f"method.scale is {scale}: expected more than 0")
    core = partial(resting_factors, scale)
    return Method(
        name="fed-sb",
        facts=Facts(
            paper="Fed-SB (arXiv 2502.15371)",
            exact=keep == "all",
            unequal_ranks=True,
            sends="R, r × r; A and B in round 1",
            receives="R, r × r; components in round 1",
            keeps="the resting pair",
            broadcasts="components",
        ),
        compress=partial(send_core, core),
        aggregate=partial(mean_core, core, keep),
        receive=partial(take_up, core),
        adopt=adopt_whole,
        core=core,
        module_subsets=False,
    )


def resting_factors(scale: float, state: State) -> LoraState:
    """U and V: the leading components of what round 1 merged, their singular values replaced by `scale`; empty before.

    They have the rank of the server's adapter, whatever the participant's own. A direction that round 1 did not use is
    zero in both, and stays unused.
    """
    return LoraState(
        {module: _resized(pair, whole_rank(state, module), scale) for module, pair in state.frozen.items()}
    )


def _resized(pair: LoraPair, rank: int, scale: float) -> LoraPair:
    missing = max(rank - pair.rank, 0)
    a, b = pair.A[:rank], pair.B[:, :rank]
    b = b * (scale / b.norm(dim=0).clamp_min(1e-30))
    return LoraPair(torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing)))


def send_core(core: Core, state: State, after: LoraState, context: Context) -> tuple[Mapping[str, Tensor], Entries]:
    """R_k of every module, one row for every component that is trained; A and B as long as nothing rests."""
    pairs = core(state)
    if not pairs:
        return send_factors(both_factors, state, after, context)
    matrices = {f"{module}/{CORE}": core_matrix(pair.A, pairs[module].A) for module, pair in after.items()}
    return state.memory, {name: code_dense(name, matrix, context) for name, matrix in matrices.items()}


def mean_core(core: Core, keep: Keep, state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Σ p_k R_k; at first the singular components of Σ p_k B_k A_k, to be merged."""
    resting = core(state)
    if not resting:
        return first_components(keep, state, updates, context)
    means = weighted_mean(updates, read=partial(whole_core, state.adapter, resting))
    return Aggregate({name: code_dense(name, mean, context) for name, mean in means.items()})


def whole_core(adapter: LoraState, resting: LoraState, entries: Entries) -> dict[str, Tensor]:
    """R_k as its client uses it: the rows that it sent, then those of the server's `adapter`."""
    whole = {}
    for name, entry in entries.items():
        module, sent = module_of(name), to_dense(entry)
        beyond = adapter[module].A[len(sent) :]
        whole[name] = torch.cat([sent, core_matrix(beyond, resting[module].A)]) if len(beyond) else sent
    return whole


def first_components(keep: Keep, state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """B = U Σ and A = V of the sum of products, r components or all."""
    sums = product_sums(updates, state.adapter)
    ranks = state.adapter.ranks() if keep == "leading" else dict.fromkeys(sums)
    cuts = {module: total.truncate(rank=ranks[module]) for module, total in sums.items()}
    kept = {module: 1.0 - cut.lost_energy for module, cut in cuts.items()}
    lost = max((cut.lost_energy for cut in cuts.values()), default=0.0)
    increments = LoraState({module: cut.pair for module, cut in cuts.items()})
    return Aggregate(dense_entries(increments, context, FROZEN), {}, {"max_lost_energy": lost}, kept)


def take_up(core: Core, state: State, entries: Entries, context: Context) -> State:
    """A = R V with the R that was broadcast; after the first components U and V rest between an R of zero."""
    increments = read_pairs(entries, FROZEN)
    if increments:
        state = replace(state, frozen=merge_increment(state.frozen, increments))
    pairs = {}
    for module, pair in core(state).items():
        matrix = torch.zeros(pair.rank, pair.rank) if increments else to_dense(entries[f"{module}/{CORE}"])
        pairs[module] = LoraPair(matrix @ pair.A, pair.B)
    return adopt_whole(state, LoraState(pairs), state.frozen)
