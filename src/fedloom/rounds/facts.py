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

from fedloom.compress.entries import Entry, count, floats, to_dense
from fedloom.lora.pair import module_of
from fedloom.methods.method import Entries, State
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
    held = []
    for client in clients:  # one payload at a time
        entries = cohort.decoded.entries(client, cohort.payloads, state, modules)
        held.append({name: to_dense(entries[name]) for name in sorted(entries)})
        del entries
        give_back(cohort.facts[client].size)
    names = sorted(set.intersection(*(set(tensors) for tensors in held)))
    if not names:
        return None
    rows = _stack([[tensors.pop(name) for name in names] for tensors in held])
    whole = rows.mean(dim=0)
    sizes = rows.norm(dim=1) * whole.norm()
    known = sizes > 0
    return float((rows[known] @ whole / sizes[known]).mean()) if bool(known.any()) else None


def _stack(held: list[list[Tensor]]) -> Tensor:
    """One row a client: its tensors cut to the shape that all of theirs have. They are taken out of their lists."""
    shapes = [
        tuple(map(min, zip(*(tensor.shape for tensor in alike), strict=True))) for alike in zip(*held, strict=True)
    ]
    rows = torch.empty(len(held), sum(map(count, shapes)))
    for row, tensors in zip(rows, held, strict=True):
        torch.cat(
            [tensor[tuple(map(slice, shape))].reshape(-1) for tensor, shape in zip(tensors, shapes, strict=True)],
            out=row,
        )
        tensors.clear()
    return rows


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
