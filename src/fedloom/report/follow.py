"""A run that another process plays, shown from its ledger as that grows: the calls that its engine would have made."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from fedloom.errors import CheckpointError
from fedloom.records.events import RunFacts
from fedloom.records.ledger import (
    Aggregation,
    Evaluation,
    Note,
    Presence,
    Roll,
    Row,
    RunRow,
    Training,
    Transfer,
    Validation,
)
from fedloom.records.rows import ROWS
from fedloom.records.session import End, Session
from fedloom.report.live import EventKeeper


class LedgerTail:
    """The rows of a ledger that were not read yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._again = False
        self._begin()

    def read(self) -> tuple[bool, list[Row]]:
        """(whether it begins again, the new rows): a run that goes on cuts its ledger back, and another replaces it.

        Raises CheckpointError for a line that is no row, again at every read until it is gone: to go on behind it would
        leave its bytes out of every sum.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._again = True
                    self._begin()
                    file.seek(0)
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError:  # not there, or not any more
            self._again |= self._offset > 0
            self._begin()
            whole = end = b""
        rows = self._rows(whole) if end else []
        again, self._again = self._again, False
        return again, rows

    def _begin(self) -> None:
        """Nothing was read: no byte, no line, and no last line to know the ledger by."""
        self._offset, self._lines, self._last = 0, 0, b""

    def _rows(self, whole: bytes) -> list[Row]:
        """The rows of whole lines, which are read now."""
        lines, rows = whole.split(b"\n"), list[Row]()
        for number, line in enumerate(lines, start=self._lines + 1):
            try:
                rows.append(ROWS.validate_json(line))
            except ValidationError:
                raise CheckpointError(f"{self._path} has a line that is no row of a ledger: line {number}") from None
        self._offset, self._lines, self._last = (
            self._offset + len(whole) + 1,
            self._lines + len(lines),
            lines[-1] + b"\n",
        )
        return rows


class Replay:
    """Makes the calls of an engine from the rows that it wrote. out: the folder of the run."""

    def __init__(self, view: EventKeeper, out: Path) -> None:
        self._view, self._out = view, out
        self._run: RunRow | None = None
        self._closing: int | None = None  # the round that is over but for its evaluation
        self._combined = False  # whether its updates were averaged
        self._scores: dict[str, Evaluation] = {}
        self._trained: dict[str, Training] = {}
        self._received: dict[str, int] = {}
        self._answered: set[str] = set()
        self._done = 0  # the last round that is over
        self._up = self._down = 0
        self._seconds = 0.0

    def take(self, row: Row) -> None:
        """One row."""
        if isinstance(row, End) and not self._combined:
            self._closing = None  # the run ended within the round
        if self._closing is not None and not _belongs(row, self._closing):
            self.close_round()
        match row:
            case RunRow():
                self._run = row
            case Session():
                self._begin(row)
            case Note():
                self._view.noted(row.round, row.text)
            case Training():
                self._trained[row.client] = row
            case Transfer(delivery=False):
                self._move(row)
            case Evaluation():
                self._closing = row.round
                self._scores[row.domain] = row
                self._seconds += row.seconds
            case Aggregation():
                self._closing, self._combined = row.round, True
                self._seconds += row.seconds
            case Roll():
                self._closing = row.round
                self._seconds += row.seconds
            case Presence():
                self._view.sites_seen(row.missing)
                self._expect(row)
            case _:
                pass  # validation, choices, answers: nothing that a view shows

    def pause(self) -> None:
        """No further row has come: a round that was evaluated is over. Its scores are written at one go."""
        if self._scores:
            self.close_round()

    def close_round(self) -> None:
        """The round that was being closed is over."""
        round, self._closing, self._combined = self._closing, None, False
        if round is not None and self._run is not None and (round or self._scores):
            rounds, scores = self._run.num_rounds, dict(self._scores) or None
            self._view.round_finished(round, rounds, scores, self._up, self._down, self._seconds)
        self._done = max(self._done, round or 0)
        self._scores, self._trained, self._received, self._answered = {}, {}, {}, set()
        self._up, self._down, self._seconds = 0, 0, 0.0

    def _begin(self, row: Session) -> None:
        if self._run is None:
            return
        run, self._done = self._run, row.round
        facts = RunFacts(
            method=run.method,
            model=run.model,
            clients=run.clients,
            num_rounds=run.num_rounds,
            adapter_values=run.adapter_values,
            out=self._out,
            first_round=row.round + 1,
            together=True,
        )
        self._view.run_started(facts)

    def _expect(self, row: Presence) -> None:
        """The first round sends nothing to a site that begins with the server's own state, and waits for all."""
        if row.round == 1 and not self._done:
            for site in row.online:
                if site not in self._answered:
                    self._view.client_started(1, site)

    def _move(self, row: Transfer) -> None:
        if row.is_talk:
            self._down, self._up = (
                self._down + row.bytes * (row.direction == "down"),
                self._up + row.bytes * (row.direction == "up"),
            )
            return
        if row.direction == "down":
            self._down += row.bytes
            self._received[row.client] = self._received.get(row.client, 0) + row.bytes
            self._view.client_started(row.round, row.client)
            return
        self._up += row.bytes
        trained = self._trained.pop(row.client, None)
        if trained is not None:  # otherwise it came too late to count
            received = self._received.pop(row.client, 0)
            self._answered.add(row.client)
            self._view.client_started(row.round, row.client)
            self._view.client_finished(row.round, row.client, trained.loss, row.bytes, received)


class LedgerFeed:
    """The newest session of the run in `out`, for a view: what was in the folder before is not shown.

    began: whether that session has begun; end: how it ended, None until then; round: the last that was aggregated.
    """

    def __init__(self, view: EventKeeper, out: Path) -> None:
        self._tail = LedgerTail(out / "ledger.jsonl")
        self._replay = Replay(view, out)
        self.run: RunRow | None = None
        self.end: End | None = None
        self.began = False
        self.round = 0
        self._before: Session | None = None
        for row in self._tail.read()[1]:
            if isinstance(row, Session):
                self._before = row

    def look(self) -> None:
        """Show what was written since the last look."""
        again, rows = self._tail.read()
        if again:
            self.began = False
        for row in rows:
            self._take(row)
        if self.began and not rows:
            self._replay.pause()

    def close(self) -> None:
        """Show what is left."""
        self.look()
        self._replay.close_round()

    def _take(self, row: Row) -> None:
        if isinstance(row, RunRow):
            self.run = row
            self._replay.take(row)
        elif isinstance(row, Session) and row != self._before:
            self._before, self.began, self.end = row, True, None
            self.round = row.round
        if isinstance(row, End) and self.began:
            self.end = row
        if isinstance(row, Aggregation) and self.began:
            self.round = row.round
        if self.began and not isinstance(row, RunRow):
            self._replay.take(row)


def _belongs(row: Row, round: int) -> bool:
    """Whether a row may come while a round is closed."""
    return isinstance(row, Aggregation | Evaluation | Validation | Note | Presence) and row.round == round
