"""Who takes part in a round: a seeded draw, the same in every engine and in an estimate."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from fedloom.compress.seeds import derived_seed
from fedloom.records.config import Config


@dataclass(frozen=True, slots=True)
class Attendance:
    """Who is asked in a round, and who of them vanishes after the download."""

    asked: tuple[str, ...]
    vanished: frozenset[str]

    @property
    def answering(self) -> tuple[str, ...]:
        """Who does not vanish."""
        return tuple(client for client in self.asked if client not in self.vanished)


def draw_attendance(config: Config, clients: Collection[str], round: int) -> Attendance:
    """The seeded draw of one round: `fraction_train` of the clients, at least one."""
    federation = config.federation
    draw = random.Random(derived_seed(federation.seed, "attendance", round))
    asked = tuple(sorted(draw.sample(sorted(clients), federation.clients_per_round(len(clients)))))
    return Attendance(asked, frozenset(name for name in asked if draw.random() < federation.drop_out))


def draw_rounds(config: Config, clients: Collection[str]) -> Iterator[Attendance]:
    """The seeded draws of all rounds, as a run will make them."""
    return (draw_attendance(config, clients, round) for round in range(1, config.federation.num_rounds + 1))
