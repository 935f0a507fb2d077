"""A run's points from its folder, while it is played and when it is over.

    checkpoints/  how far the ledger is settled ─┐
    ledger.jsonl  rows ──────────────────────────┴→ points ─→ every tracker
    log.jsonl     when a round was over ─────────┘

A point is made once a checkpoint covers its round: a run that goes on after a crash plays the rounds after its
checkpoint anew, so that nothing of them has been told before.
"""

from __future__ import annotations

import json
import math
import re
import time
import tomllib
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fedloom.records import serverlog
from fedloom.records.ledger import Row
from fedloom.records.session import End, Session
from fedloom.report.follow import LedgerTail
from fedloom.report.progress import Progress
from fedloom.trackers.points import Point, Rounds
from fedloom.trackers.sinks import Ending, TrackedRun

IDENTITY = "tracking.json"
"""In a run's folder: the identifier under which trackers know the run."""
_HIDDEN = ("clients", "flower", "local", "output")
"""Tables of settings that no tracker is told: they name sites and addresses, or say nothing about what comes out."""
_NAMING = ("federation.participants", "federation.regions", "federation.client_examples", "federation.pace")
"""Keys that name sites."""
_TIMED = re.compile(rb'\{"time": "([^"]+)", "level": "\w+", "event": "(?!session|end)\w+", "round": ?(\d+)')


class RunFollower:
    """The run in a folder, as far as it is told. progress: of all its rows, also of those that may be undone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tail = LedgerTail(folder / "ledger.jsonl")
        self._times = RoundTimes(folder / serverlog.FILE)
        self._begin()

    def _begin(self) -> None:
        self.progress, self._rounds = Progress(), Rounds()
        self._waiting: deque[Row] = deque()
        self._taken = 0
        self.points: list[Point] = []

    def look(self) -> None:
        """Read what is new, and make the points of the rounds that are settled."""
        round, count = read_settled(self.folder / "checkpoints")  # before the ledger, which is on disk before it
        again, rows = self._tail.read()
        if again:
            self._begin()
        for row in rows:
            self.progress.take(row)
        self._waiting.extend(rows)
        if isinstance(self.progress.last, End) and self.progress.last.status == "finished":
            round, count = self.progress.last.round, self._taken + len(self._waiting)
        while self._waiting and self._taken < count:
            self._rounds.take(self._waiting.popleft())
            self._taken += 1
        when = self._times.read()
        for one in self._rounds.close(round):
            before = self.points[-1].time if self.points else time.time()
            self.points.append(replace(one, time=when.get(one.round, before)))

    def describe(self, project: str, name: str = "") -> TrackedRun:
        """What trackers are told of the run; a name that is not given is that of its folder.

        Raises CheckpointError where no row says what the run is.
        """
        run, session = self.progress.run, self.progress.session
        facts = {"method": run.method, "model": Path(run.model).name, "clients": str(len(run.clients))}
        versions = session.versions if session else {}
        return TrackedRun(
            id=identify(self.folder),
            name=name or name_run(self.folder.resolve()),
            project=project,
            folder=self.folder,
            began=self.points[0].time if self.points else time.time(),
            settings=read_settings(session) if session else {},
            facts={**facts, **{f"version.{library}": version for library, version in versions.items()}},
        )

    def judge(self) -> Ending:
        """How the run has ended; interrupted where its process is gone without a word."""
        told, end = self.progress, self.progress.last
        sums = {"bytes_up": told.bytes_up, "bytes_down": told.bytes_down, "rounds": told.done}
        if not isinstance(end, End):
            return Ending("interrupted", "its process ended without a word", sums)
        return Ending(end.status, end.reason, {**sums, "seconds": end.seconds} if math.isfinite(end.seconds) else sums)


def name_run(folder: Path) -> str:
    """The run's name where none is given: that of its folder, after the variant's in a comparison."""
    return f"{folder.parent.name}-{folder.name}" if folder.name.startswith("seed-") else folder.name


class RoundTimes:
    """When rounds were over, from the server's log, whose new lines alone are read each time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._found: dict[int, float] = {}

    def read(self) -> Mapping[int, float]:
        """Round → seconds since 1970; of one that was played again, the last time."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError:
            return self._found
        self._offset += len(whole) + len(end)
        for line in whole.split(b"\n"):
            timed = _TIMED.match(line)
            if timed:
                self._found[int(timed[2])] = datetime.fromisoformat(timed[1].decode()).timestamp()
        return self._found


def read_settled(folder: Path) -> tuple[int, int]:
    """(the last round that the newest checkpoint covers, the ledger's rows by then); (-1, 0) where there is none."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("round-*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["fedloom"])["facts"]
                return int(facts["round"]), int(facts["ledger_rows"])
        except (OSError, SafetensorError, KeyError, ValueError):  # dropped meanwhile, or not whole: the one before
            continue
    return -1, 0


def read_settings(session: Session) -> dict[str, str | int | float | bool]:
    """The settings of a session by dotted key, but for what names sites or addresses."""
    try:
        tree = tomllib.loads(session.settings)
    except tomllib.TOMLDecodeError:
        return {}
    flat = dict(_flatten({table: held for table, held in tree.items() if table not in _HIDDEN}))
    return {key: value for key, value in flat.items() if not any(f"{key}.".startswith(f"{name}.") for name in _NAMING)}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str | int | float | bool) else json.dumps(value)


def identify(folder: Path) -> str:
    """The identifier under which trackers know the run in this folder; it is written before any of them hears it."""
    path = folder / IDENTITY
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    made = uuid.uuid4().hex
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"id": made}) + "\n", encoding="utf-8")
    partial.replace(path)
    return made
