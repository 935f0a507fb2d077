"""How the updates of a round lie to one another: inner products of the changes of weight that they stand for.

(B, A) and (B M, M⁻¹ A) are the same change, so that distances between factors mean nothing. What an update does is the
change of ΔW, B' A' − B A = B' (A' − A) + (B' − B) A: a pair of rank 2 r, in which nothing cancels. Inner products of
such pairs are ⟨ΔW_i, ΔW_j⟩ = tr(B_iᵀ B_j A_j A_iᵀ), summed over modules; no m × n matrix is formed. All that a rule
needs follows from the K × K matrix of them, its Gram matrix: norms, distances, and distances of means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedloom.compress.entries import Entry, to_dense
from fedloom.lora.lowrank import inner_product
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import CORE, SCALARS, Method, State
from fedloom.rounds.cohort import Cohort, restrict_state


def gram_matrix(method: Method, state: State, cohort: Cohort, clients: Sequence[str]) -> Tensor:
    """⟨ΔW_i − ΔW, ΔW_j − ΔW⟩ of what these clients sent (float64, K × K); a module that one lacks it leaves as it is.

    Modules are taken in blocks, of which all clients' factors together take about as much memory as one adapter.
    """
    gram = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    for modules in _blocks(state.adapter, len(clients)):
        part = restrict_state(state, modules)
        moved = [find_change(method, part, cohort.update(client, 1.0, state, modules).entries) for client in clients]
        for i, one in enumerate(moved):
            for j, other in enumerate(moved[: i + 1]):
                gram[i, j] += sum(inner_product(one[m], other[m]) for m in one if m in other)
    return gram.tril() + gram.tril(-1).T


def find_change(method: Method, state: State, entries: Mapping[str, Entry]) -> LoraState:
    """What the model in use would change by if it were this client's alone: module → a pair of rank 2 r at most."""
    moved: dict[str, dict[str, Tensor]] = {}
    for name, entry in method.plain(entries).items():
        module, _, part = name.rpartition("/")
        moved.setdefault(module, {})[part] = to_dense(entry)
    if method.forward:
        return LoraState({m: _scalar_change(held[SCALARS]) for m, held in moved.items()})
    resting = method.core(state)
    if resting:
        return LoraState({m: _core_change(state.adapter[m], resting[m], held[CORE]) for m, held in moved.items()})
    return LoraState({m: _pair_change(state.adapter[m], held, method.updates) for m, held in moved.items()})


def _pair_change(pair: LoraPair, sent: Mapping[str, Tensor], updates: str) -> LoraPair:
    """B' (A' − A) + (B' − B) A of a client's first components; a factor that it did not send has stayed."""
    rank = sent["A"].shape[0] if "A" in sent else sent["B"].shape[1]
    a, b = pair.A[:rank], pair.B[:, :rank]
    steps = {
        part: sent[part] if updates == "change" else sent[part] - own
        for part, own in (("A", a), ("B", b))
        if part in sent
    }
    right = [*([steps["A"]] if "A" in steps else []), *([a] if "B" in steps else [])]
    left = [*([b + steps.get("B", 0.0)] if "A" in steps else []), *([steps["B"]] if "B" in steps else [])]
    return LoraPair(torch.cat(right), torch.cat(left, dim=1))


def _scalar_change(scalars: Tensor) -> LoraPair:
    """The steps as a pair of rank 1: drawn directions are nearly orthogonal and all as long, so that inner products of
    steps are those of the changes of the factors but for one scale.
    """
    return LoraPair(scalars[None], torch.ones(1, 1))


def _core_change(pair: LoraPair, resting: LoraPair, core: Tensor) -> LoraPair:
    """U (R' V − R V) of a client's first rows of the matrix between the factors."""
    rank = core.shape[0]
    return LoraPair(core @ resting.A - pair.A[:rank], pair.B[:, :rank])


def _blocks(adapter: LoraState, clients: int) -> Iterator[list[str]]:
    """The modules in runs of about the adapter's size over the number of clients."""
    room, block, held = adapter.numel() / max(clients, 1), [], 0
    for module, pair in adapter.items():
        block.append(module)
        held += pair.rank * sum(pair.shape)
        if held >= room:
            yield block
            block, held = [], 0
    if block:
        yield block
