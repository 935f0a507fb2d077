"""Weights & Biases, online or offline as WANDB_MODE says.

Online the service says which step comes next, and drops what is older. An offline run cannot be gone on with: its
folder is written anew from the ledger, and what was not synced of the one before is removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedloom.trackers.points import Point
from fedloom.trackers.sinks import Ending, TrackedRun

PATIENCE = 30
"""Seconds for which its service is waited for."""


class WandbRun:
    """A sink. Its files are in the run's folder, wandb/, unless WANDB_DIR says otherwise."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        place = Path(os.environ.get("WANDB_DIR") or run.folder)
        _drop_offline(place / "wandb", run.id)
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, init_timeout=PATIENCE
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or run.project,
            id=run.id,
            name=run.name,
            dir=str(place),
            resume="allow",
            config={**run.settings, **run.facts},
            settings=settings,
        )
        self._next = int(self._run.step) if self._run.resumed and not self._run.offline else 0

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.round >= self._next:
                self._run.log({**point.values, "_timestamp": point.time}, step=point.round, commit=True)
                self._next = point.round + 1

    def end(self, ending: Ending) -> None:
        for name, value in {"state": ending.status, "reason": ending.reason, **ending.sums}.items():
            self._run.summary[name] = value
        self._run.finish(exit_code=0 if ending.status == "finished" else 1)


def _drop_offline(folder: Path, id: str) -> None:
    for old in folder.glob(f"offline-run-*-{id}*"):
        if not any(old.glob("*.synced")):
            shutil.rmtree(old)
