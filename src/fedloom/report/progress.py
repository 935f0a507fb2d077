"""A run as its rows tell it so far, each row taken in once: what is asked for after every round and every second.

`numbers.summarise` reads all rows for the report of a run; here nothing grows with the rounds but a set of their
numbers, so the thousandth round costs what the first one does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from fedloom.errors import CheckpointError
from fedloom.records.ledger import (
    Aggregation,
    Choice,
    Evaluation,
    Note,
    Presence,
    Relay,
    Roll,
    Row,
    RunRow,
    Training,
    Transfer,
)
from fedloom.records.session import End, Session
from fedloom.report.answers import AnswerCount, Awaited
from fedloom.report.numbers import Point, values_of

NOTES = 6
"""How many of the newest notes are kept."""


@dataclass(eq=False, slots=True)
class Progress:
    """losses: client → mean loss of its last training. sent: client → [bytes up, bytes down]; relayed: the
    same of regions. done: the last round that was aggregated. roll, presence, session, end: the newest of each. last:
    the newest row.

    train_seconds, server_seconds: as in `numbers.Report`.
    """

    losses: dict[str, float] = field(default_factory=dict)
    sent: dict[str, list[int]] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    relayed: dict[str, list[int]] = field(default_factory=dict)
    transfers: int = 0
    done: int = 0
    retries: int = 0
    late: int = 0
    notes: int = 0
    newest_notes: deque[Note] = field(default_factory=lambda: deque(maxlen=NOTES))
    train_seconds: float = 0.0
    server_seconds: float = 0.0
    roll: Roll | None = None
    presence: Presence | None = None
    session: Session | None = None
    end: End | None = None
    last: Row | None = None
    answers: AnswerCount = field(default_factory=AnswerCount)
    awaited: Awaited = field(default_factory=Awaited)
    _run: RunRow | None = None
    _choice: Choice | None = None
    _first: dict[str, Evaluation] = field(default_factory=dict)
    _newest: dict[str, Evaluation] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Self:
        """What these rows come to."""
        found = cls()
        for row in rows:
            found.take(row)
        return found

    @property
    def run(self) -> RunRow:
        """What the run is; num_rounds is that of its end where it was stopped early.

        Raises CheckpointError where no row says what the run is.
        """
        if self._run is None:
            raise CheckpointError("the ledger records no run: its first row is missing")
        return self._run if self._choice is None else replace(self._run, num_rounds=self._choice.round)

    @property
    def exported(self) -> int | None:
        """The round whose model the run leaves, where it was chosen on the validation split."""
        return None if self._choice is None else self._choice.exported

    @property
    def points(self) -> tuple[Point, ...]:
        """The first and the newest evaluation, without the bytes sent by then; one where there is no other."""
        found = [self._first] if self._newest is self._first else [self._first, self._newest]
        return tuple(Point(max(row.round for row in one.values()), values_of(one), 0) for one in found if one)

    @property
    def online(self) -> dict[str, str]:
        """Site → "" where it can be asked, otherwise why not; empty where no row says so."""
        told = self.presence
        return {} if told is None else {**dict.fromkeys(told.online, ""), **told.missing}

    def take(self, row: Row) -> None:
        """Take in the next row."""
        self.answers.take(row)
        self.awaited.take(row)
        match row:
            case Transfer():
                self._count(row)
            case Training():
                self.losses[row.client] = row.loss
                self.train_seconds += _known(row.seconds)
            case Aggregation():
                self.done, self.server_seconds = max(self.done, row.round), self.server_seconds + _known(row.seconds)
                self.answers.settle(row.round)
            case Evaluation():
                self._score(row)
            case Note():
                self.notes += 1
                self.newest_notes.append(row)
            case Roll():
                self.roll, self.retries, self.late = row, self.retries + row.tries - 1, self.late + len(row.late)
            case Presence():
                self.presence = row
            case Relay():
                self.relayed.setdefault(row.region, [0, 0])[row.direction == "down"] += row.bytes
            case RunRow():
                self._run, self._choice = row, None
            case Choice():
                self._choice = row
            case Session():
                self.session = row
            case End():
                self.end = row
        self.last = row

    def _count(self, row: Transfer) -> None:
        up = row.direction == "up"
        self.sent.setdefault(row.client, [0, 0])[not up] += row.bytes
        self.bytes_up, self.bytes_down = self.bytes_up + row.bytes * up, self.bytes_down + row.bytes * (not up)
        self.transfers += 1

    def _score(self, row: Evaluation) -> None:
        """Rounds come in order; those of one round, one row for each domain, belong together."""
        if not self._newest or row.round > next(iter(self._newest.values())).round:
            self._newest = {}
            self._first = self._first or self._newest
        if not self._newest or row.round == next(iter(self._newest.values())).round:
            self._newest[row.domain] = row


def _known(seconds: float) -> float:
    """A ledger has NaN where a clock said nothing."""
    return seconds if math.isfinite(seconds) else 0.0


def latest_values(progress: Progress) -> Mapping[str, Mapping[str, float]]:
    """Measure → domain (and their mean) → value at the newest evaluation; empty where nothing was held out."""
    return progress.points[-1].values if progress.points else {}
