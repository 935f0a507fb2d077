"""Who answered and who did not, round by round, from the ledger of any engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedloom.records.ledger import Aggregation, Roll, Row, RunRow, Training, Transfer
from fedloom.records.session import End


@dataclass(frozen=True, slots=True)
class Answers:
    """One client: rounds in which its update came, rounds in which it was asked in vain, its last answered one.

    row: rounds in a row in which it was asked in vain, up to the last one.
    """

    answered: int = 0
    missed: int = 0
    last: int = 0
    row: int = 0


class AnswerCount:
    """Who answered, as the rows come in.

    A roll in the ledger decides; without one, a client that was sent something was asked. A payload sent after a
    round's aggregation delivers the result: it does not ask for an update.
    """

    def __init__(self) -> None:
        self._settled: dict[str, Answers] = {}
        self._before = 0  # the round from which on nothing is settled
        self._asked: dict[int, set[str]] = {}
        self._came: dict[int, set[str]] = {}
        self._called: set[int] = set()
        self._closed: set[int] = set()

    def take(self, row: Row) -> None:
        """Take in the next row."""
        if isinstance(row, Aggregation):
            self._closed.add(row.round)
        elif isinstance(row, Roll):
            self._called.add(row.round)
            self._came[row.round] = set(row.answered)
            self._asked[row.round] = {*row.answered, *row.failed}
        elif isinstance(row, Transfer) and not (
            row.is_talk or row.undone or row.round < self._before or self._is_over(row.round)
        ):
            sent = self._came if row.direction == "up" else self._asked
            sent.setdefault(row.round, set()).add(row.client)

    def settle(self, before: int) -> None:
        """No row about the rounds before this one is to come: they need not be kept."""
        self._add_to(self._settled, [round for round in self._rounds() if round < before])
        for held in (self._asked, self._came):
            for round in [round for round in held if round < before]:
                del held[round]
        self._before = before

    def counts(self) -> dict[str, Answers]:
        """Client → its answers so far."""
        found = dict(self._settled)
        self._add_to(found, self._rounds())
        return found

    def _rounds(self) -> list[int]:
        return sorted({*self._asked, *self._came})

    def _is_over(self, round: int) -> bool:
        return round in self._called or round in self._closed

    def _add_to(self, counts: dict[str, Answers], rounds: Iterable[int]) -> None:
        for round in rounds:
            there = self._came.get(round, set())
            for client in sorted(self._asked.get(round, set()) | there):
                held = counts.get(client, Answers())
                if client in there:
                    counts[client] = Answers(held.answered + 1, held.missed, round, 0)
                elif self._is_over(round):
                    counts[client] = Answers(held.answered, held.missed + 1, held.last, held.row + 1)
                else:
                    counts[client] = held


def count_answers(rows: Iterable[Row]) -> dict[str, Answers]:
    """Client → its answers."""
    found = AnswerCount()
    for row in rows:
        found.take(row)
    return found.counts()


class Awaited:
    """Whom the round in progress waits for, as the rows come in."""

    def __init__(self) -> None:
        self._run: RunRow | None = None
        self._round = 0
        self._asked: set[str] = set()
        self._came: set[str] = set()
        self._closed: set[int] = set()
        self._ended = False

    def take(self, row: Row) -> None:
        """Take in the next row."""
        self._ended = isinstance(row, End)
        if isinstance(row, RunRow):
            self._run = row
        elif isinstance(row, Roll | Aggregation):
            self._closed.add(row.round)
        elif isinstance(row, Training) or (isinstance(row, Transfer) and _is_asking(row)):
            if row.round > self._round:
                self._round, self._asked, self._came = row.round, set(), set()
            if row.round == self._round:
                self._asked.add(row.client)
                if isinstance(row, Training):
                    self._came.add(row.client)

    def clients(self) -> list[str]:
        """Those that the round has asked and that have not answered, or all where the ledger does not say."""
        if self._run is None or self._round in self._closed or self._ended:
            return []
        # The first round sends nothing to a site that begins with the server's own state.
        asked = self._asked if self._round > 1 else set(self._run.clients)
        return sorted(asked - self._came)


def _is_asking(row: Transfer) -> bool:
    return row.direction == "down" and not (row.delivery or row.undone or row.is_talk)
