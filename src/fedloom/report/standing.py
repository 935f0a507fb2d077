"""How a run stands: by the last rows of its ledger, and by whether somebody still writes into its folder."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from fedloom.errors import CheckpointError
from fedloom.records.ledger import Row, read_rows
from fedloom.records.lock import Writer, find_writer
from fedloom.records.session import End
from fedloom.report.facts import human_seconds
from fedloom.report.progress import Progress

State: TypeAlias = Literal["running", "finished", "failed", "interrupted", "gone"]


@dataclass(frozen=True, slots=True)
class Standing:
    """A run as it stands. state: "gone" where its process has ended without a word. quiet: seconds since its last row.

    again: the command that goes on with it, from its folder alone; "" where there is nothing to go on with.
    """

    state: State
    reason: str
    rounds: int
    planned: int
    quiet: float
    writer: Writer
    again: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come."""
        return self.state != "running"

    @property
    def is_well(self) -> bool:
        """Whether it is running or has finished."""
        return self.state in ("running", "finished")

    def describe(self) -> str:
        """In words."""
        ago = f"last row {human_seconds(max(self.quiet, 0.1))} ago"
        if self.state == "running":
            where = f", written on {self.writer.host}" if self.writer.alive is None and self.writer.host else ""
            return ": ".join(filter(None, (self.reason, f"{ago}{where}")))
        if self.state == "gone":
            who = f"process {self.writer.pid}, which wrote it," if self.writer.pid else "the process that wrote it"
            return f"not running: {who} has ended without a word, {ago}"
        return ": ".join(filter(None, (self.state, self.reason)))


def read_run(folder: Path) -> tuple[list[Row], Standing]:
    """The rows of the run in a folder, and how it stands. Raises CheckpointError where the folder holds none."""
    writer, quiet = look_at(folder)
    rows = read_rows(folder / "ledger.jsonl")
    return rows, judge_standing(rows, writer, quiet, resume_command(folder))


def look_at(folder: Path) -> tuple[Writer, float]:
    """(who writes into a run's folder, seconds since its last row), to be asked before its rows are read.

    A run that ends between the two looks has said how. Raises CheckpointError where the folder holds no run.
    """
    path, writer = folder / "ledger.jsonl", find_writer(folder)
    if writer.alive and (not path.is_file() or not path.stat().st_size):
        raise CheckpointError(f"the run in {folder} is being set up by process {writer.pid}: look again in a moment")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected the folder of a run that has begun")
    return writer, time.time() - path.stat().st_mtime


def judge_standing(rows: Iterable[Row], writer: Writer, quiet: float, again: str = "") -> Standing:
    """How the run of these rows stands. again: the command that would go on with it."""
    return judge_progress(Progress.of(rows), writer, quiet, again)


def judge_progress(progress: Progress, writer: Writer, quiet: float, again: str = "") -> Standing:
    """The same of a run that has come so far."""
    planned, rounds = progress.run.num_rounds, progress.done
    end = progress.last if isinstance(progress.last, End) else None
    state: State = end.status if end else "running"
    reason = end.reason if end else ""
    if end and writer.alive and end.status != "finished":
        state, reason = "running", f"going on after it {end.status}" if end.status == "failed" else "going on"
    elif not end and writer.alive is False:
        # A ledger of before the row "end" was written says by its rounds alone that it is over.
        state = "finished" if rounds >= planned else "gone"
    held = state in ("failed", "interrupted", "gone")
    return Standing(state, reason, rounds, planned, quiet, writer, again if held else "")


def resume_command(folder: Path) -> str:
    """The command that goes on with the run in a folder, by the settings that it keeps there."""
    engine = []
    if (folder / "sites").is_dir():  # in which the simulation keeps its sites
        engine = ["--engine", "flower-sim"]
    elif (folder / "job").exists():  # the name that a run has at its sites
        engine = ["--engine", "flower"]
    return shlex.join(["fedloom", "run", str(folder / "config.toml"), "--out", str(folder), *engine, "--resume"])
