"""What an engine knows of its clients' states; and the states of many simulated clients, in little memory.

Clients that hold the same version hold the same tensors, once. What a client holds that is further back than broadcasts
reach is not kept at all: it will be sent the full state, which replaces everything but its ranks and its own memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from fedloom.lora import LoraState
from fedloom.method import State
from fedloom.rounds import Job, start

Ranks = tuple[tuple[str, int], ...]


class Held(Mapping[str, State]):
    """Client → what is known of its state."""

    def __init__(self, states: Mapping[str, State]) -> None:
        self._states = dict(states)

    def __getitem__(self, client: str) -> State:
        return self._states[client]

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def hold(self, client: str, state: State) -> None:
        """The client now holds `state`."""
        self._states[client] = state

    def forget(self, oldest: int) -> None:
        """Versions before `oldest` can only be brought forward by a full state: what is kept of them may go."""


class Roster(Held):
    """Every client's whole state. What clients hold alike is kept once."""

    def __init__(self, job: Job, initial: LoraState, ranks: Mapping[str, Mapping[str, int]]) -> None:
        kinds: dict[Ranks, Ranks] = {}
        keys = {client: tuple(sorted(own.items())) for client, own in ranks.items()}
        self._kinds = {client: kinds.setdefault(key, key) for client, key in keys.items()}
        self._start = {kind: start(job, initial, dict(kind)) for kind in kinds}
        super().__init__({client: self._start[kind] for client, kind in self._kinds.items()})
        self._shared: dict[tuple[int, Ranks], State] = {}

    def hold(self, client: str, state: State) -> None:
        """Its tensors are those of another client at the same point, where they are equal."""
        found = self._shared.setdefault((state.version, self._kinds[client]), replace(state, memory={}))
        self._states[client] = replace(found, memory=state.memory) if same(found, state) else state

    def forget(self, oldest: int) -> None:
        """What is let go of leaves version, digest and memory."""
        self._shared = {key: state for key, state in self._shared.items() if key[0] >= oldest}
        for client, state in self._states.items():
            first = self._start[self._kinds[client]]
            if state.version < oldest and state.adapter is not first.adapter:
                own = replace(first, version=state.version, digest=state.digest, memory=state.memory)
                self._states[client] = own


def same(one: State, two: State) -> bool:
    """Whether two states have the same bits, but for what is private."""
    pairs = ((one.adapter, two.adapter), (one.frozen, two.frozen), (one.tail, two.tail))
    return one.digest == two.digest and all(identical(a.tensors(), b.tensors()) for a, b in pairs)


def identical(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    """Equal names, shapes and bits."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
