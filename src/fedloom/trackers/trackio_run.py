"""trackio: its database on this machine (TRACKIO_DIR says where); `trackio show` shows it, `trackio sync` shares it.

Points are written as trackio's own imports are, at once and each with an identifier of which it keeps one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from fedloom.trackers.points import Point
from fedloom.trackers.sinks import Ending, TrackedRun


class TrackioRun:
    """A sink."""

    def __init__(self, run: TrackedRun) -> None:
        from trackio import SQLiteStorage

        self._store, self._run, self._sent = SQLiteStorage, run, -1

    def send(self, points: Sequence[Point]) -> None:
        run, left = self._run, [point for point in points if point.round > self._sent]
        if not left:
            return
        self._store.bulk_log(
            run.project,
            run.name,
            [dict(point.values) for point in left],
            steps=[point.round for point in left],
            timestamps=[datetime.fromtimestamp(point.time, UTC).isoformat() for point in left],
            config={**run.settings, **run.facts},
            log_ids=[f"{run.id}-{point.round}" for point in left],
            run_id=run.id,
        )
        self._sent = left[-1].round

    def end(self, ending: Ending) -> None:
        run = self._run
        sums = ", ".join(f"{name} {value:g}" for name, value in ending.sums.items())
        self._store.bulk_alert(
            run.project,
            run.name,
            titles=[f"run {ending.status}"],
            texts=["; ".join(filter(None, (ending.reason, sums)))],
            levels=["info" if ending.status == "finished" else "warn"],
            steps=[max(self._sent, 0)],
            alert_ids=[f"{run.id}-{ending.status}-{self._sent}"],
            run_id=run.id,
        )
