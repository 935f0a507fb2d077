"""What a round comes to as numbers with names, from the rows of a ledger: one point a round, made once it is over.

Names of clients are in none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from fedloom.records.ledger import (
    Aggregation,
    Evaluation,
    Note,
    Relay,
    Roll,
    Row,
    Training,
    Transfer,
    Validation,
)
from fedloom.report.numbers import MEAN, values_of

MOST_DOMAINS = 32
"""Domains whose scores have names of their own; a tracker with a chart for each of a thousand shows nothing."""


@dataclass(frozen=True, slots=True)
class Point:
    """A round's numbers by name, all finite. Round 0 is before the first.

    time: when it was over, seconds since 1970.
    """

    round: int
    values: Mapping[str, float]
    time: float = 0.0


@dataclass(eq=False, slots=True)
class _Round:
    """The rows of one round, as far as they have come."""

    up: int = 0
    down: int = 0
    relayed_up: int = 0
    relayed_down: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    sent: set[str] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)
    marks: dict[str, int] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    validations: dict[str, Validation] = field(default_factory=dict)
    roll: Roll | None = None
    stats: Mapping[str, float] = field(default_factory=dict)

    def take(self, row: Row) -> None:
        match row:
            case Transfer():
                up = row.direction == "up"
                self.up, self.down = self.up + row.bytes * up, self.down + row.bytes * (not up)
                self._spend("transfer", row.seconds)
                if not (row.undone or row.delivery or up):
                    self.sent.add(row.client)
            case Relay():
                up = row.direction == "up"
                self.relayed_up, self.relayed_down = (
                    self.relayed_up + row.bytes * up,
                    self.relayed_down + row.bytes * (not up),
                )
            case Training():
                self.losses.append(row.loss)
                self.answered.add(row.client)
                self._spend("train", row.seconds)
                self._spend_all("clients", row)
            case Evaluation():
                self.evaluations[row.domain] = row
                self._spend("evaluate", row.seconds)
            case Validation():
                self.validations[row.domain] = row
            case Aggregation():
                self.stats = row.stats
                self._spend("aggregate", row.seconds)
                self._spend_all("server", row)
            case Roll():
                self.roll = row
                self._spend("gather", row.seconds)
            case Note():
                self.marks[row.about] = self.marks.get(row.about, 0) + bool(row.about)

    def _spend_all(self, who: str, row: Training | Aggregation) -> None:
        """What the seconds of a turn were spent on, where the ledger says so."""
        for stage, seconds in row.stages.items():
            self._spend(f"{who}_{stage}", seconds)

    def _spend(self, stage: str, seconds: float) -> None:
        if math.isfinite(seconds) and seconds > 0:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


class Rounds:
    """Rounds as their rows come in, each handed out once, in order, when it is closed."""

    def __init__(self) -> None:
        self._open: dict[int, _Round] = {}
        self._closed = -1
        self.up = self.down = 0

    def take(self, row: Row) -> None:
        """Take in the next row. What comes about a round that is closed counts in the sums of the next alone."""
        round = getattr(row, "round", None)
        if round is None:
            return
        self._open.setdefault(round if round > self._closed else self._closed + 1, _Round()).take(row)

    def close(self, upto: int) -> list[Point]:
        """The points of the rounds that are not closed yet, up to this one."""
        points = []
        for round in sorted(number for number in self._open if number <= upto):
            held = self._open.pop(round)
            self.up, self.down = self.up + held.up, self.down + held.down
            values = {name: float(value) for name, value in self._values(round, held) if math.isfinite(value)}
            if values:
                points.append(Point(round, values))
        self._closed = max(self._closed, upto)
        return points

    def _values(self, round: int, held: _Round) -> Iterable[tuple[str, float]]:
        if round:
            yield from {
                "bytes/up": held.up,
                "bytes/down": held.down,
                "bytes/total_up": self.up,
                "bytes/total_down": self.down,
            }.items()
            yield from _attendance(held)
        if held.relayed_up or held.relayed_down:
            yield from {"bytes/regions_up": held.relayed_up, "bytes/regions_down": held.relayed_down}.items()
        losses = [loss for loss in held.losses if math.isfinite(loss)]
        if losses:
            yield "train/loss", fmean(losses)
        yield from ((f"seconds/{stage}", seconds) for stage, seconds in held.seconds.items())
        yield from _scores(held)
        yield from ((f"server/{key}", value) for key, value in held.stats.items())


def _attendance(held: _Round) -> Iterable[tuple[str, float]]:
    failed, late = (held.roll.failed, held.roll.late) if held.roll else ({}, {})
    asked = held.sent | held.answered | failed.keys() | late.keys()
    yield "clients/answered", len(held.answered)
    yield "clients/missed", len(asked - held.answered)
    yield "clients/refused", held.marks.get("refused", 0)
    yield "clients/diverged", held.marks.get("diverged", 0)
    if held.roll:
        yield from {"clients/failed": len(failed), "clients/late": len(late), "clients/tries": held.roll.tries}.items()


def _scores(held: _Round) -> Iterable[tuple[str, float]]:
    """Means over domains, and each domain where there are a few."""
    values = values_of(held.evaluations) if held.evaluations else {}
    for measure, by_domain in values.items():
        yield f"eval/{measure}", by_domain[MEAN]
        if 1 < len(held.evaluations) <= MOST_DOMAINS:
            yield from ((f"eval/{measure}/{domain}", by_domain[domain]) for domain in held.evaluations)
    if held.validations:
        rows = held.validations.values()
        yield "validation/loss", fmean(row.loss for row in rows)
        yield "validation/exact_match", fmean(row.exact_match for row in rows)
