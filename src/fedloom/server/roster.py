"""What an engine knows of its clients' states; and the states of many simulated clients, in little memory.

Clients of the same ranks at the same version hold the same bits. So the state at the server's version is computed once
for all of them, by the function that clients call on a broadcast. Of a client that is behind, only its version, digest
and memory are kept: the payloads that it is sent next lead to that one state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fedloom.errors import RoundError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import State
from fedloom.rounds.checks import expect
from fedloom.rounds.job import Job, group_alike
from fedloom.rounds.turns import accept, accept_own, start
from fedloom.wire import decode, read_header
from fedloom.workspace.recall import Recall

Ranks = tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False, slots=True)
class Held:
    """What is kept of a client that has been asked."""

    version: int
    digest: str
    memory: Mapping[str, torch.Tensor]


class Roster(Mapping[str, State]):
    """Client → its state. One that is behind has the tensors of the start: use their shapes only.

    Nothing is kept of a client until it is asked for the first time, and nothing is done about those who are absent.
    """

    def __init__(self, job: Job, initial: LoraState, ranks: Mapping[str, Mapping[str, int]]) -> None:
        kinds: dict[Ranks, Ranks] = {}
        alike = {id(own): tuple(sorted(own.items())) for _, own, _ in group_alike(ranks)}
        self._job = job
        self._kinds = {client: kinds.setdefault(alike[id(own)], alike[id(own)]) for client, own in ranks.items()}
        self._first = {kind: start(job, initial, dict(kind)) for kind in kinds}
        self._latest = dict(self._first)
        self._held: dict[str, Held] = {}
        self._headers = Recall(read_header)
        self._arrived: dict[Ranks, tuple[bytes, State]] = {}

    def __getitem__(self, client: str) -> State:
        kind, held = self._kinds[client], self._held.get(client)
        first, latest = self._first[kind], self._latest[kind]
        if held is None:
            return first
        there = (held.version, held.digest) == (latest.version, latest.digest)
        return replace(latest if there else first, version=held.version, digest=held.digest, memory=held.memory)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def hold(self, client: str, state: State) -> None:
        """Keep the client's version, digest and memory. Its tensors are those of its ranks and version."""
        self._held[client] = Held(state.version, state.digest, state.memory)

    def attended(self) -> dict[str, State]:
        """The states of those who were ever asked; all others have that of the start."""
        return {client: self[client] for client in self._held}

    def follow(self, payload: bytes) -> None:
        """The server has moved on by this broadcast, or to this full state: bring the state of every kind of client
        forward. A client without the payload is behind from now on.
        """
        message = decode(payload)  # once for all kinds
        self._latest = {
            kind: accept_own(self._job, latest, message, dict(kind)) for kind, latest in self._latest.items()
        }
        self._arrived.clear()

    def receive(self, client: str, payloads: Sequence[bytes]) -> None:
        """Bring one client to the latest state by what it is sent.

        Raises StaleError where a payload rests on another state than the one before leads to, and RoundError where all
        of them together do not lead to the latest.
        """
        kind = self._kinds[client]
        state, latest = self[client], self._latest[kind]
        version, digest, whole = state.version, state.digest, True
        for payload in payloads:
            header = self._headers.of(payload)
            if header.kind == "state":
                state = self._adopt(replace(state, version=version, digest=digest), kind, payload)
                version, digest, whole = state.version, state.digest, state.adapter is latest.adapter
                continue
            if not (self._job.method.replaces and header.base_version > version):
                expect(header, "change", version, digest)
            version, digest = header.base_version + 1, header.result_digest
        if not whole or (version, digest) != (latest.version, latest.digest):
            raise RoundError(f"what client {client} was sent leads to version {version}, not to the server's")
        self._held[client] = Held(version, digest, state.memory)

    def _adopt(self, state: State, kind: Ranks, payload: bytes) -> State:
        """The state that a full state leads to, with the latest one's tensors where they are the same bits.

        Of clients without memory, all of one kind come to the same by the same payload: it is read once for them.
        """
        latest, (known, found) = self._latest[kind], self._arrived.get(kind, (b"", state))
        if (known is payload or known == payload) and not state.memory:
            return found
        found = accept(self._job, state, payload)
        if same_state(found, latest):
            found = replace(latest, version=found.version, digest=found.digest, memory=found.memory)
        if not state.memory:
            self._arrived[kind] = payload, found
        return found


def same_state(one: State, two: State) -> bool:
    """Whether two states have the same bits in all that is shared; private memory does not count."""
    pairs = zip(one.shared, two.shared, strict=True)
    return one.digest == two.digest and all(same_bits(a.tensors(), b.tensors()) for a, b in pairs)


def same_bits(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    """Whether names, shapes and bits are equal."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
