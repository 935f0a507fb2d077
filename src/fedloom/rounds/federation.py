"""Server and clients of a federation in memory: every client turns, the server turns, everybody accepts.

Two clients whose training adds the same noise to B, and what the first round moves:

    >>> import torch
    >>> from fedloom import Federation, Job, LoraPair, LoraState, Trained, build, quantize
    >>> def train(state, round, seed):
    ...     noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(round))
    ...     return Trained(state.adapter.map(lambda pair: LoraPair(pair.A, pair.B + noise)), num_examples=1, loss=0.0)
    >>> job = Job(method=build("fedit"), seed=0, quantize=quantize("fp32"))
    >>> adapter = LoraState({"q_proj": LoraPair(A=torch.ones(2, 5), B=torch.zeros(6, 2))})
    >>> federation = Federation(job, adapter, clients={"bank": None, "lab": None})
    >>> result = federation.round(train)
    >>> {client: len(payload) for client, payload in result.uploads.items()}, len(result.broadcast)
    ({'bank': 184, 'lab': 184}, 184)
    >>> [state.version for state in (federation.server, *federation.clients.values())]
    [1, 1, 1]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedloom.lora.pair import LoraState
from fedloom.rounds.job import Job
from fedloom.rounds.step import Train
from fedloom.rounds.turns import ServerTurn, accept, client_turn, full_state, narrow_broadcast, server_turn, start


@dataclass(frozen=True, eq=False, slots=True)
class RoundResult:
    """What one round moved and said.

    uploads: client → the payload that it sent. broadcast: the payload that the server sent. refused: client → why its
    payload was not averaged. stats: the method's numbers.
    """

    uploads: Mapping[str, bytes]
    broadcast: bytes
    refused: Mapping[str, str]
    stats: Mapping[str, float]


class Federation:
    """The server's state and every client's. Payloads are encoded and decoded exactly as in a run.

    clients: name → rank by module of what the client trains; None where it trains all of `adapter` at its ranks.
    `number` counts the rounds that were played.
    """

    def __init__(self, job: Job, adapter: LoraState, clients: Mapping[str, Mapping[str, int] | None]) -> None:
        self.job = replace(job, start=adapter)
        self.ranks = {client: adapter.ranks() if ranks is None else ranks for client, ranks in clients.items()}
        self.server = start(job, adapter)
        self.clients = {client: start(job, adapter, ranks) for client, ranks in self.ranks.items()}
        self.number = 0

    def round(self, train: Train | Mapping[str, Train]) -> RoundResult:
        """Play one round. `train` is everybody's step, or client → step for those who attend; the others only receive.

        Raises RoundError if the server can use no payload, NumericError where a training diverged.
        """
        steps = train if isinstance(train, Mapping) else dict.fromkeys(self.clients, train)
        self.number += 1
        uploads = {client: self.client_turn(client, step) for client, step in steps.items()}
        turn = self.server_turn(uploads)
        self.deliver(turn)
        return RoundResult(uploads, turn.payload, turn.refused, turn.stats)

    def client_turn(self, client: str, train: Train) -> bytes:
        """One client trains; the payload that it sends."""
        turn = client_turn(self.job, client, self.clients[client], (), train, self.number)
        self.clients[client] = turn.state
        return turn.payload

    def server_turn(self, uploads: Mapping[str, bytes]) -> ServerTurn:
        """The server combines what was sent and applies it to its own state."""
        turn = server_turn(self.job, self.server, uploads, self.number)
        self.server = turn.state
        return turn

    def deliver(self, turn: ServerTurn) -> None:
        """Every client receives the broadcast, or the full state where the broadcast does not lead to the server's."""
        for client, state in self.clients.items():
            received = accept(self.job, state, self.broadcast_for(client, turn.payload))
            if received.version != self.server.version:  # the server consolidated
                received = accept(self.job, received, full_state(self.job, self.server, self.number))
            self.clients[client] = received

    def broadcast_for(self, client: str, broadcast: bytes) -> bytes:
        """The broadcast as the client is sent it: cut to its ranks where the method cuts."""
        return narrow_broadcast(self.job, broadcast, self.ranks[client])
