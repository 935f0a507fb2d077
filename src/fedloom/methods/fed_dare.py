"""Fed-DARE: random elements of the change, rescaled so that the mean is right (Yu et al., ICML 2024, arXiv 2311.03099).

Unbiased, with a variance of q / (1 − q) times the square of each element. The mask follows from a seed and costs
no bytes. A client of lower rank has changed nothing beyond its own components (`shared.whole`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor

from fedloom.compress.entries import Entry, Seeded, Sparse, floats
from fedloom.compress.masks import nearest_density, seeded_mask
from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import Aggregate, Context, Entries, Facts, Method, State, Update
from fedloom.methods.shared.averaging import code_dense, fill_within_budget, weighted_mean, zero_change
from fedloom.methods.shared.whole import add_to_whole, adopt_whole, read_whole_change


def fed_dare(*, sparsity: float = 0.9) -> Method:
    """sparsity: the share q of every client's change that is dropped, 0 ≤ q < 1; wire.budget takes its place."""
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError(f"method.sparsity is {sparsity}: expected 0 ≤ sparsity < 1")
    return Method(
        name="fed-dare",
        facts=Facts(
            paper="DARE (arXiv 2311.03099)",
            unequal_ranks=True,
            sends="random elements of ΔA and ΔB",
            receives="the mean change, sparse where that is shorter",
            broadcasts="change",
        ),
        updates="change",
        compress=partial(send_random, 1.0 - sparsity),
        aggregate=mean_change,
        receive=add_to_whole,
        adopt=adopt_whole,
        adds=read_whole_change,
        takes_budget=True,
    )


def send_random(
    density: float, state: State, after: LoraState, context: Context
) -> tuple[Mapping[str, Tensor], Entries]:
    """A seeded share of ΔA and ΔB, divided by the share."""
    before, now = state.adapter.tensors(), after.tensors()

    def entries_at(density: float) -> dict[str, Seeded]:
        seeds = {name: derived_seed(context.seed, "upload", context.round, name) for name in now}
        return {name: drop_and_rescale(now[name] - before[name], density, seeds[name], context)[0] for name in now}

    if context.budget is None:
        return state.memory, entries_at(density)
    done = fill_within_budget(state, len(now), entries_at, context, positions=False)
    return {**state.memory, **done.memory}, done.entries


def drop_and_rescale(delta: Tensor, density: float, seed: int, context: Context) -> tuple[Seeded, Tensor]:
    """A random share of the elements divided by that share, and what is left of the tensor without it."""
    density = nearest_density(density)
    mask = seeded_mask(delta.numel(), density, seed)
    kept = delta.flatten()[mask]
    values = context.quantize(kept / density, seed)
    rest = delta.flatten().clone()
    rest[mask] = kept - floats(values) * density
    return Seeded(tuple(delta.shape), seed, density, values), rest.view_as(delta)


def mean_change(state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Σ p_k Δ_k of what arrived; a client of lower rank has changed nothing beyond its rank."""
    means = weighted_mean(updates, start=zero_change(state.adapter))
    return Aggregate({name: shorter_entry(name, tensor, context) for name, tensor in means.items()})


def shorter_entry(name: str, tensor: Tensor, context: Context) -> Entry:
    """Sparse where at most half of the elements are not zero, otherwise dense."""
    positions = tensor.flatten().nonzero().squeeze(1)
    if 2 * positions.numel() > tensor.numel():
        return code_dense(name, tensor, context)
    seed = derived_seed(context.seed, "download", context.round, name)
    return Sparse(tuple(tensor.shape), positions, context.quantize(tensor.flatten()[positions], seed))
