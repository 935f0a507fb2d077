"""The same attendance undisturbed: whoever was counted in a round takes part in it, in one process, with no faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedloom.records.config import Config
from fedloom.records.events import Silent
from fedloom.server.attendance import Attendance
from fedloom.server.engine import Updates
from fedloom.server.local import LocalSites
from fedloom.server.loop import Rounds
from fedloom.workspace.assemble import Setup
from fedloom.workspace.folder import RunFolder


class Attending(LocalSites):
    """Sites of which those take part that took part in another run. attended: round → sites."""

    attended: Mapping[int, tuple[str, ...]]

    def collect(self, rounds: Rounds, present: Attendance) -> Updates:
        """The updates of a round."""
        return super().collect(rounds, replace(present, asked=self.attended[rounds.round]))


def replay(setup: Setup, config: Config, out: Path, attended: Mapping[int, tuple[str, ...]]) -> Path:
    """Play it; returns the run's folder."""
    with RunFolder.open(out, config) as folder:
        sites = Attending(setup)
        sites.attended = attended
        Rounds(setup, folder, Silent(), sites).play(resume=False)
    return out
