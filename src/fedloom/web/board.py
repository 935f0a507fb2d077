"""The pages that are served, kept up to date: one of all runs side by side, one of each run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedloom.errors import FedloomError
from fedloom.records.lock import find_writer
from fedloom.report.page import Page, RunSet
from fedloom.web.runs import Runs

Stamp = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Waiting:
    """In place of a page that cannot be shown yet: why."""

    reason: str


class Board:
    """What is shown of the runs. Its methods may be called by several threads at once."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._lock = threading.Lock()
        self._views: dict[str, _View] = {}

    def names(self) -> dict[str, Path]:
        """Name → folder of the runs that are there now."""
        return self._runs.find()

    def look(self, name: str = "") -> Page | Waiting | None:
        """The page of one run, or without a name that of all; None where there is no such run."""
        with self._lock:
            found = self._runs.find()
            if name and name not in found:
                self._views.pop(name, None)
                return None
            folders = [found[name]] if name else list(found.values())
            return self._views.setdefault(name, _View()).look(folders)


class _View:
    """One page, made anew where something has changed in the folders of its runs, and otherwise kept."""

    def __init__(self) -> None:
        self._stamp: Stamp = ()
        self._set = RunSet([])
        self._shown: Page | Waiting = Waiting("")

    def look(self, folders: Sequence[Path]) -> Page | Waiting:
        stamp = tuple(_stamp(folder) for folder in folders)
        if stamp != self._stamp or not stamp:
            self._shown = self._read([folder for folder in folders if _has_begun(folder)], len(folders))
            self._stamp = stamp
        return self._shown

    def _read(self, begun: Sequence[Path], found: int) -> Page | Waiting:
        if not begun:
            return Waiting("The run is being set up." if found else "There is no run here yet.")
        if tuple(begun) != tuple(self._set.folders):
            self._set = RunSet(begun)
        try:
            return self._set.read()
        except (FedloomError, OSError) as error:
            self._set = RunSet([])  # from the beginning at the next look
            sound = [folder for folder in begun if len(begun) > 1 and _is_sound(folder)]
            return self._read(sound, found) if sound else Waiting(str(error))


def _stamp(folder: Path) -> Stamp:
    """What changes as soon as the page of a run has to."""
    try:
        held = (folder / "ledger.jsonl").stat()
    except OSError:
        return (folder, None)
    return (folder, held.st_ino, held.st_size, held.st_mtime_ns, find_writer(folder).alive)


def _is_sound(folder: Path) -> bool:
    """Whether a run can be read. One that cannot says why on its own page, and does not hide the others."""
    try:
        RunSet([folder]).read()
    except (FedloomError, OSError):
        return False
    return True


def _has_begun(folder: Path) -> bool:
    try:
        return (folder / "ledger.jsonl").stat().st_size > 0
    except OSError:
        return False
