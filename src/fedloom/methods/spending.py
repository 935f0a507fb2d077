"""The bytes of a whole run, divided: what a method is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RunShape:
    """What is known of a run beforehand.

    per_rank: values of an adapter of rank 1, Σ (m + n) over its modules, of which there are `modules`. most_rank: the
    largest that may be chosen. clients, asked: how many there are, and how many of them turn in a round.
    """

    per_rank: int
    modules: int
    most_rank: int
    rounds: int
    clients: int
    asked: int

    @property
    def turns(self) -> float:
        """Turns of a client in the whole run, on the mean."""
        return self.asked * self.rounds / self.clients

    @property
    def broadcasts(self) -> float:
        """Broadcasts of the server from one turn of a client to its next."""
        return self.clients / self.asked


@dataclass(frozen=True, slots=True)
class Spending:
    """How a run is to be played so that a client takes so many bytes.

    rank: of every module. payload: bytes of a payload, the mean of both ways, where a turn has one of each. settings:
    of the method. said: in words, for whoever asked.
    """

    rank: int
    payload: float
    settings: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    said: str = ""
