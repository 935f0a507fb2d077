"""Run folders read for a page; again and again, where they grow."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedloom.errors import CheckpointError
from fedloom.records.ledger import Row
from fedloom.report.folders import runs_below
from fedloom.report.follow import LedgerTail
from fedloom.report.numbers import Report, summarise
from fedloom.report.page.build import build_page
from fedloom.report.page.model import Page
from fedloom.report.page.run import PageRun
from fedloom.report.prediction import ComparedRow, compare_prediction
from fedloom.report.standing import Standing, judge_standing, look_at, resume_command


@dataclass(eq=False, slots=True)
class _Followed:
    """A run's folder, what was read of its ledger, and what it came to."""

    folder: Path
    tail: LedgerTail
    rows: list[Row]
    report: Report | None = None

    def look(self) -> tuple[Report, Standing]:
        """What it comes to now."""
        writer, quiet = look_at(self.folder)
        again, new = self.tail.read()
        if again:  # the run was cut back to its checkpoint, or another takes its place
            self.rows.clear()
        self.rows += new
        if again or new or self.report is None:
            self.report = summarise(self.rows, str(self.folder))
        return self.report, judge_standing(self.rows, writer, quiet, resume_command(self.folder))


class RunSet:
    """One or several runs for one page. folders: of runs."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)
        self._runs = [_Followed(folder, LedgerTail(folder / "ledger.jsonl"), []) for folder in self.folders]
        self._seen = ""
        self._page: Page | None = None

    def read(self) -> Page:
        """All that the page shows now; of a ledger only the rows are read that are new.

        Raises CheckpointError where a folder holds no run.
        """
        looks = [run.look() for run in self._runs]
        stand = [standing.state for _, standing in looks]
        seen = repr([(len(run.rows), run.rows[-1:], state) for run, state in zip(self._runs, stand, strict=True)])
        if self._page is None or seen != self._seen:
            runs = [
                PageRun(run.folder, report, run.rows, standing, _compare(run.folder, run.rows))
                for run, (report, standing) in zip(self._runs, looks, strict=True)
            ]
            self._page = build_page(runs, hashlib.sha256(seen.encode()).hexdigest()[:16])
            self._seen = seen
        return self._page


def page_of(folder: Path, report: Report, rows: Sequence[Row]) -> Page:
    """The page of one run that is over, or that nobody asks about any more."""
    return build_page([PageRun(folder, report, rows, None, _compare(folder, rows))])


def _compare(folder: Path, rows: Sequence[Row]) -> list[ComparedRow]:
    """Predicted beside measured; nothing where the prediction cannot be read, which is no reason to have no page."""
    try:
        return compare_prediction(folder, rows)
    except CheckpointError:
        return []


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders of runs: those named, and of one that holds none itself, as compare's, those below it, by name.

    Raises CheckpointError where there is none.
    """
    found: list[Path] = []
    for folder in folders:
        below = [run for run in runs_below(folder) if (run / "ledger.jsonl").is_file()]  # some may be set up just now
        if not below:
            raise CheckpointError(f"{folder} holds no run: expected ledger.jsonl in it, or in a folder below it")
        found += below
    return list(dict.fromkeys(found))
