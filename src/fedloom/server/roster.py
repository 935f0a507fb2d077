"""What an engine knows of its clients' states; and the states of many simulated clients, in little memory.

Clients of the same ranks at the same version hold the same bits. So the state at the server's version is computed once
for all of them, by the function that clients call on a broadcast. Of a client that is behind, only its version, digest
and memory are kept: the payloads that it is sent next lead to that one state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from fedloom.errors import RoundError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import State
from fedloom.rounds.checks import expect
from fedloom.rounds.job import Job
from fedloom.rounds.turns import accept, accept_own, start
from fedloom.wire import decode, read_header

Ranks = tuple[tuple[str, int], ...]


class ClientStates(Mapping[str, State]):
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

    def follow(self, payload: bytes) -> None:
        """The server has moved on by this broadcast, or to this full state."""


class Roster(ClientStates):
    """Every client's state. A client that is behind has the tensors of the start: use their shapes only."""

    def __init__(self, job: Job, initial: LoraState, ranks: Mapping[str, Mapping[str, int]]) -> None:
        kinds: dict[Ranks, Ranks] = {}
        keys = {client: tuple(sorted(own.items())) for client, own in ranks.items()}
        self._job = job
        self._kinds = {client: kinds.setdefault(key, key) for client, key in keys.items()}
        self._first = {kind: start(job, initial, dict(kind)) for kind in kinds}
        self._latest = dict(self._first)
        self._stated: dict[Ranks, bytes] = {}  # full states that were found to lead to the latest
        super().__init__({client: self._first[kind] for client, kind in self._kinds.items()})

    def hold(self, client: str, state: State) -> None:
        """Keep the client's version, digest and memory. Its tensors are those of its ranks and version."""
        latest, first = self._latest[self._kinds[client]], self._first[self._kinds[client]]
        there = (state.version, state.digest) == (latest.version, latest.digest)
        tensors = latest if there else first
        own = replace(tensors, version=state.version, digest=state.digest, memory=state.memory)
        super().hold(client, own)

    def follow(self, payload: bytes) -> None:
        """Bring the state of every kind of client forward. A client without the payload is behind from now on."""
        message = decode(payload)  # once for all kinds
        self._stated.clear()
        self._latest = {
            kind: accept_own(self._job, latest, message, dict(kind)) for kind, latest in self._latest.items()
        }
        for client, state in self._states.items():
            self.hold(client, state)

    def receive(self, client: str, payloads: Sequence[bytes]) -> None:
        """Bring one client to the latest state by what it is sent.

        Raises StaleError where a payload rests on another state than the one before leads to, and RoundError where all
        of them together do not lead to the latest.
        """
        kind = self._kinds[client]
        state, latest = self[client], self._latest[kind]
        whole = True
        for payload in payloads:
            header = read_header(payload)
            if header.kind == "state":
                if payload != self._stated.get(kind):  # the first client of its kind: the others are sent the same
                    whole = same_state(accept(self._job, state, payload), latest)
                    self._stated |= {kind: payload} if whole else {}
                state = replace(latest, memory=state.memory)
            else:
                if not (self._job.method.replaces and header.base_version > state.version):
                    expect(header, "change", state)
                state = replace(state, version=header.base_version + 1, digest=header.result_digest)
        if not whole or (state.version, state.digest) != (latest.version, latest.digest):
            raise RoundError(f"what client {client} was sent leads to version {state.version}, not to the server's")
        self.hold(client, state)


def same_state(one: State, two: State) -> bool:
    """Whether two states have the same bits in adapter, frozen and tail; private memory does not count."""
    pairs = ((one.adapter, two.adapter), (one.frozen, two.frozen), (one.tail, two.tail))
    return one.digest == two.digest and all(same_bits(a.tensors(), b.tensors()) for a, b in pairs)


def same_bits(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    """Whether names, shapes and bits are equal."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
