"""Who answered and who did not, round by round, from the ledger of any engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedloom.records.ledger import Aggregation, Roll, Row, Transfer


@dataclass(slots=True)
class Answers:
    """One client: rounds in which its update came, rounds in which it was asked in vain, its last answered one."""

    answered: int = 0
    missed: int = 0
    last: int = 0


def count_answers(rows: Iterable[Row]) -> dict[str, Answers]:
    """Client → its answers. A roll in the ledger decides; without one, a client that was sent something was asked.

    A payload sent after a round's aggregation delivers the result: it does not ask for an update.
    """
    clients: dict[str, Answers] = {}
    asked: dict[int, set[str]] = {}
    came: dict[int, set[str]] = {}
    called: set[int] = set()
    closed: set[int] = set()
    for row in rows:
        if isinstance(row, Aggregation):
            closed.add(row.round)
        elif isinstance(row, Roll):
            called.add(row.round)
            came[row.round] = set(row.answered)
            asked[row.round] = {*row.answered, *row.failed}
        elif isinstance(row, Transfer) and row.round not in closed | called:
            sent = came if row.direction == "up" else asked
            sent.setdefault(row.round, set()).add(row.client)
    for round in sorted({*asked, *came}):
        there = came.get(round, set())
        for client in sorted(asked.get(round, set()) | there):
            tally = clients.setdefault(client, Answers())
            if client in there:
                tally.answered, tally.last = tally.answered + 1, round
            elif round in called | closed:
                tally.missed += 1
    return clients
