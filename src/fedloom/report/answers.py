"""Who answered and who did not, round by round, from the ledger of any engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedloom.records.ledger import Aggregation, Presence, Roll, Row, RunRow, Training, Transfer
from fedloom.records.session import End


@dataclass(slots=True)
class Answers:
    """One client: rounds in which its update came, rounds in which it was asked in vain, its last answered one.

    row: rounds in a row in which it was asked in vain, up to the last one.
    """

    answered: int = 0
    missed: int = 0
    last: int = 0
    row: int = 0


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
        elif isinstance(row, Transfer) and not row.undone and row.round not in closed | called:
            sent = came if row.direction == "up" else asked
            sent.setdefault(row.round, set()).add(row.client)
    for round in sorted({*asked, *came}):
        there = came.get(round, set())
        for client in sorted(asked.get(round, set()) | there):
            tally = clients.setdefault(client, Answers())
            if client in there:
                tally.answered, tally.last, tally.row = tally.answered + 1, round, 0
            elif round in called | closed:
                tally.missed, tally.row = tally.missed + 1, tally.row + 1
    return clients


def find_presence(rows: Sequence[Row]) -> dict[str, str]:
    """Site → "" where it can be asked, otherwise why not, as the newest row about it says; empty where none does."""
    told = next((row for row in reversed(rows) if isinstance(row, Presence)), None)
    return {} if told is None else {**dict.fromkeys(told.online, ""), **told.missing}


def find_awaited(rows: Sequence[Row]) -> list[str]:
    """Clients that the round in progress waits for: those it has asked, or all where the ledger does not say."""
    run = next((row for row in reversed(rows) if isinstance(row, RunRow)), None)
    turns = [row for row in rows if isinstance(row, Training) or (isinstance(row, Transfer) and _is_asking(row))]
    closed = {row.round for row in rows if isinstance(row, Roll | Aggregation)}
    current = max((row.round for row in turns), default=0)
    if run is None or current in closed or any(isinstance(row, End) for row in rows[-1:]):
        return []
    came = {row.client for row in turns if row.round == current and isinstance(row, Training)}
    # The first round sends nothing to a site that begins with the server's own state.
    asked = {row.client for row in turns if row.round == current} if current > 1 else set(run.clients)
    return sorted(asked - came)


def _is_asking(row: Transfer) -> bool:
    return row.direction == "down" and not row.delivery and not row.undone
