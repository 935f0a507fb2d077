"""Who takes part in a round: a seeded draw, the same in every engine and in an estimate."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice

from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError
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
    """The seeded draw of one round: `fraction_train` of the clients, at least one, of those who may still train."""
    if config.turns_of_client == config.federation.num_rounds:
        return _draw(config, clients, len(clients), round)
    return next(islice(draw_rounds(config, clients), round - 1, None))


def draw_rounds(config: Config, clients: Collection[str]) -> Iterator[Attendance]:
    """The seeded draws of all rounds, as a run will make them."""
    most, asked = config.turns_of_client, Counter[str]()
    for round in range(1, config.federation.num_rounds + 1):
        left = [client for client in clients if asked[client] < most]
        drawn = _draw(config, left, len(clients), round)
        asked.update(drawn.asked)
        yield drawn


def check_attendance(config: Config, clients: int) -> None:
    """Raises ConfigError where `training.dp.rounds` leaves rounds of so many clients with fewer than they ask."""
    most, rounds = config.turns_of_client, config.federation.num_rounds
    wanted = rounds * config.federation.clients_per_round(clients)
    if most * clients < wanted:
        raise ConfigError(
            f"training.dp.rounds = {most} lets {clients} clients train {most * clients:,} times in all, and {rounds} "
            f"rounds ask for {wanted:,}: raise it, or lower federation.num_rounds or federation.fraction_train"
        )


def _draw(config: Config, left: Collection[str], clients: int, round: int) -> Attendance:
    """The draw of one round of a run of so many clients, from those who are left."""
    federation = config.federation
    draw = random.Random(derived_seed(federation.seed, "attendance", round))
    asked = tuple(sorted(draw.sample(sorted(left), min(len(left), federation.clients_per_round(clients)))))
    return Attendance(asked, frozenset(name for name in asked if draw.random() < federation.drop_out))
