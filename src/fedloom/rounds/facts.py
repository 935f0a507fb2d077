"""What a round can say of itself beside its bytes: where its time went, how far clients drift apart, what every module
was sent.

All of it is read off what the round has at hand anyway. What takes a pass over values, however short, is taken in
`TOLD` rounds of a run at most, and of a few clients and modules, so that no round is slower for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from fedloom.compress.entries import Entry, Sparse, count, floats, to_dense
from fedloom.lora.pair import module_of
from fedloom.methods.method import Entries, State
from fedloom.methods.shared.averaging import add_weighted
from fedloom.rounds.cohort import Cohort
from fedloom.rounds.job import Job
from fedloom.rounds.memory import give_back

TOLD = 25
"""Rounds of a run, at even distances, in which modules and drift are told of: a map needs no more."""
_CLIENTS, _MODULES = 8, 3
"""Clients and modules on which agreement is measured: a mean over these is close to that over all."""


class Watch:
    """Seconds of the stages of a turn."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, stage: str, *, less: float = 0.0) -> None:
        """All since the last lap was this stage. less: seconds of it that were another's."""
        now = perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + max(now - self._last - less, 0.0)
        self._last = now


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """What the server sent of each module, in the order of `modules`: see `records.rows.Layers`."""

    modules: Sequence[str]
    ranks: Sequence[int]
    densities: Sequence[float]
    norms: Sequence[float]
    kept: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class TurnFacts:
    """Of a server's turn: seconds by stage, client → norm of its update, agreement of the clients, modules.

    agreement, modules: None in rounds in which they were not taken.
    """

    stages: Mapping[str, float] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None
    modules: ModuleFacts | None = None


def is_told(job: Job, round: int) -> bool:
    """Whether modules and drift are told of in this round. The last one is among them."""
    every = math.ceil(max(job.num_rounds, 1) / TOLD)
    return round % every == 0 or round in (1, job.num_rounds)


def measure_agreement(cohort: Cohort, state: State) -> float | None:
    """The cosine between a client's update and the mean of all, on the mean over clients; None where there is no mean.

    Of a few modules and clients at even distances. Where shapes differ, the part that all have counts.
    """
    clients = _spread([client for client in cohort.weights if client not in cohort.past], _CLIENTS)
    if len(clients) < 2 or cohort.sums:
        return None
    shared = frozenset.intersection(*(cohort.facts[client].modules for client in clients))
    modules = set(_spread(sorted(shared), _MODULES))
    held: list[dict[str, Kept]] = []
    for client in clients:  # one payload at a time
        entries = cohort.decoded.entries(client, cohort.payloads, state, modules)
        held.append({name: _kept(entries[name]) for name in sorted(entries)})
        del entries
        give_back(cohort.facts[client].size)
    # What stayed sparse was not copied: a look through the memory pays for tensors that were made whole alone.
    copied = sum(part.nbytes for tensors in held for part in tensors.values() if isinstance(part, Tensor))
    found = _mean_cosine(held)
    give_back(copied)
    return found


def _mean_cosine(held: Sequence[dict[str, Kept]]) -> float | None:
    """The cosine of each with the mean of all, on the mean over those that have one. The tensors are let go of."""
    names = sorted(set.intersection(*(set(tensors) for tensors in held)))
    if not names:
        return None
    products, squares, whole = [0.0] * len(held), [0.0] * len(held), 0.0
    for name in names:
        mean, parts = _mean([tensors.pop(name) for tensors in held])
        whole += float(mean.square().sum())
        for number, part in enumerate(parts):
            sent, met = _met(part, mean)
            products[number] += float(sent @ met)
            squares[number] += float(sent @ sent)
    known = [(product, math.sqrt(square * whole)) for product, square in zip(products, squares, strict=True)]
    cosines = [product / size for product, size in known if size > 0]
    return math.fsum(cosines) / len(cosines) if cosines else None


Kept = Sparse | Tensor
"""What is looked at of a tensor: sparse ones as they are, others whole."""


def _kept(entry: Entry) -> Kept:
    return entry if isinstance(entry, Sparse) else to_dense(entry)


def _mean(alike: Sequence[Kept]) -> tuple[Tensor, list[Kept]]:
    """The mean of tensors, cut to the shape that all have, and the tensors: sparse ones of that shape as they are."""
    shape = [min(sizes) for sizes in zip(*(part.shape for part in alike), strict=True)]
    common = tuple(slice(size) for size in shape)
    parts: list[Kept] = []
    for part in alike:
        fits = isinstance(part, Sparse) and list(part.shape) == shape
        whole = to_dense(part) if isinstance(part, Sparse) and not fits else part
        parts.append(whole[common] if isinstance(whole, Tensor) else whole)
    mean = torch.zeros(shape)
    for part in parts:
        add_weighted(mean, part, 1 / len(parts))
    return mean, parts


def _met(part: Kept, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The values of a tensor and those of the mean at the same places, both flat."""
    if isinstance(part, Sparse):
        return floats(part.values), mean.view(-1).index_select(0, part.positions)
    return part.reshape(-1), mean.view(-1)


def _spread(items: Sequence[str], most: int) -> list[str]:
    """At even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[place * (len(items) - 1) // (most - 1)] for place in range(most)]


def describe_modules(entries: Entries, kept: Mapping[str, float]) -> ModuleFacts:
    """Rank, density and norm of what is sent of every module. kept: module → share of the energy that was kept."""
    held: dict[str, list[tuple[str, Entry]]] = {}
    for name in sorted(entries):
        held.setdefault(module_of(name), []).append((name, entries[name]))
    ranks, densities, norms = list[int](), list[float](), list[float]()
    for parts in held.values():
        ranks.append(max((_rank(name, entry.shape) for name, entry in parts), default=0))
        whole = sum(count(entry.shape) for _, entry in parts)
        densities.append(sum(entry.values.numel() for _, entry in parts) / whole if whole else 0.0)
        norms.append(math.sqrt(sum(_square(entry) for _, entry in parts)))
    told = [kept.get(module, math.nan) for module in held] if kept else []
    return ModuleFacts(tuple(held), ranks, densities, norms, told)


def _rank(name: str, shape: tuple[int, ...]) -> int:
    """The rank of a part: the columns of a B, the rows of an A or a core."""
    return 0 if len(shape) != 2 else shape[1] if name.endswith("B") else shape[0]


def _square(entry: Entry) -> float:
    """Σ v² of the values that are sent."""
    return float(torch.linalg.vector_norm(floats(entry.values))) ** 2
