"""Simulated time for asynchronous rounds in one process: whose turn ends when.

A turn takes its client's pace (federation.pace, 1 where nothing is said). It is trained when it begins, and its update
lies in flight until it is due, so that a checkpoint holds all of it and a run that goes on trains nothing twice. Of
turns that end at the same time the order is drawn from the run's seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from fedloom.compress.seeds import derived_seed
from fedloom.lora.pair import LoraState
from fedloom.methods.method import State
from fedloom.records.config import FederationSettings
from fedloom.records.ledger import Training
from fedloom.rounds.turns import ClientTurn
from fedloom.workspace.checkpoint import Contents


@dataclass(frozen=True, eq=False, slots=True)
class Flight:
    """A client's turn until its end at `due`: what it will send, and what the client remembers once that has come in.

    trained: None where no update comes of it. received: bytes that the client was sent for it.
    """

    client: str
    due: float
    received: int
    payload: bytes = b""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    trained: Training | None = None


class Timeline:
    """The turns in flight, by client."""

    def __init__(self, federation: FederationSettings) -> None:
        self.federation = federation
        self.flights: dict[str, Flight] = {}

    def begin(self, client: str, now: float, received: int, turn: ClientTurn | None, trained: Training | None) -> None:
        """A turn begins; without a `ClientTurn` nothing will come of it, but it takes as long."""
        flight = Flight(client, now + self.federation.pace.get(client, 1.0), received)
        if turn is not None:
            flight = replace(flight, payload=turn.payload, memory=turn.state.memory, trained=trained)
        self.flights[client] = flight

    def land(self, round: int) -> list[Flight]:
        """The turns that end next, all at one time."""
        due = min(flight.due for flight in self.flights.values())
        ended = [flight for flight in self.flights.values() if flight.due == due]
        for flight in ended:
            del self.flights[flight.client]
        seed = self.federation.seed
        return sorted(ended, key=lambda flight: derived_seed(seed, "arrival", round, flight.client))

    def remember(self) -> Contents:
        """All of it, for a checkpoint."""
        held = {f"flight/{client}": flight for client, flight in self.flights.items()}
        return Contents(
            states={key: State(LoraState(), memory=flight.memory) for key, flight in held.items()},
            blobs={key: flight.payload for key, flight in held.items() if flight.payload},
            facts={"flights": [_facts_of(flight) for flight in held.values()]},
        )

    def restore(self, held: Contents) -> None:
        """Take up what a checkpoint holds."""
        for facts in held.facts["flights"]:
            key, trained = f"flight/{facts['client']}", facts["trained"]
            self.flights[facts["client"]] = Flight(
                facts["client"],
                facts["due"],
                facts["received"],
                held.blobs.get(key, b""),
                held.states[key].memory,
                None if trained is None else Training(**trained),
            )


def _facts_of(flight: Flight) -> dict[str, Any]:
    trained = None
    if flight.trained is not None:
        trained = asdict(flight.trained)
        del trained["row"]
    return {"client": flight.client, "due": flight.due, "received": flight.received, "trained": trained}


def draw_order(federation: FederationSettings, clients: Sequence[str], round: int) -> list[str]:
    """Who is asked before whom in an asynchronous round, where there are fewer places than clients: a seeded draw."""
    return random.Random(derived_seed(federation.seed, "order", round)).sample(sorted(clients), len(clients))


def draw_vanishing(federation: FederationSettings, client: str, round: int) -> bool:
    """Whether a client that begins its turn of this round vanishes after the download."""
    return random.Random(derived_seed(federation.seed, "vanish", round, client)).random() < federation.drop_out
