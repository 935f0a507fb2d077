"""Run folders read for a page; again and again, where they grow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedloom.errors import CheckpointError
from fedloom.report.page.model import Page
from fedloom.report.standing import read_run


class RunSet:
    """One or several runs for one page. folders: of runs."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)

    def read(self) -> Page:
        """All that the page shows now; of a ledger only the rows are read that are new.

        Raises CheckpointError where a folder holds no run.
        """
        over = [read_run(folder)[1].is_over for folder in self.folders]
        return Page("fedloom", "over" if all(over) else "running", "0", ())


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders of runs: those named, and of one that holds none itself, as compare's, those below it, by name.

    Raises CheckpointError where there is none.
    """
    found: list[Path] = []
    for folder in folders:
        own = [folder] if (folder / "ledger.jsonl").exists() else sorted(p.parent for p in folder.glob("*/**/ledger.jsonl"))
        if not own:
            raise CheckpointError(f"{folder} holds no run: expected ledger.jsonl in it, or in a folder below it")
        found += own
    return list(dict.fromkeys(found))
