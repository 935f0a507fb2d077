"""Asynchronous rounds over the grid: a slow site keeps nobody waiting, and its update counts when it comes."""

from __future__ import annotations

from pathlib import Path

import pytest
from desks import SITES, settings
from queues import Clock, QueueGrid, at_once
from test_rounds import local, notes, rolls, state

from fedloom.errors import ConfigError, RoundError
from fedloom.flower.settings import check_flower_settings, shared_settings
from fedloom.records.ledger import Aggregation, Training, Transfer, read_rows
from fedloom.site.protocol import Parcel

pytestmark = pytest.mark.flower
BUFFERED = ("federation.mode=buffered", "federation.buffer_size=2", "federation.num_rounds=12", "flower.deadline=100")


@pytest.fixture
def clocked(toy_federation, tmp_path, monkeypatch):
    """play(overrides, ends=…) → the finished server and the grid, on a clock of their own."""
    clock = Clock()
    clock.install(monkeypatch)

    def play(*overrides, ends=at_once, prompt=True, **more):
        grid = QueueGrid(settings(*overrides), tmp_path, clock=clock, ends=ends, prompt=prompt)
        return toy_federation(*overrides, grid=grid, **more)

    return play


def paced(**seconds: float):
    """A site's turns take so long, those of the others a second."""
    return lambda site, ask, round, begins: begins + (seconds.get(site, 1.0) if ask == "turn" else 0.0)


def rows(tmp_path: Path, kind: type) -> list:
    return [row for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, kind)]


def test_a_slow_site_keeps_nobody_waiting_and_its_update_counts(clocked, tmp_path: Path):
    federation, grid = clocked(*BUFFERED, ends=paced(lab=5.0))
    turns = [(at, site, round) for at, site, ask, round in grid.sent if ask == "turn"]
    began = {site: [at for at, name, _ in turns if name == site] for site in SITES}
    for site in ("bank", "depot"):
        gaps = [after - before for before, after in zip(began[site], began[site][1:])]
        assert max(gaps) <= 1.0 + 4 * 0.25, "a turn of a second, and a few looks for replies"
    counted = [row.client for row in rows(tmp_path, Training)]
    assert counted.count("lab") >= 2 and len(counted) >= 23
    stale = [step.stats["max_staleness"] for step in rows(tmp_path, Aggregation)]
    assert max(stale) >= 4 and "refused" not in notes(tmp_path)
    assert federation.server.version == 12
    held = [grid.node(site).desk.held.after for site in SITES]
    assert {(one.version, one.digest) for one in held} == {(federation.server.version, federation.server.digest)}


@pytest.mark.parametrize("method", ["fedsrd", "fedit"])
def test_where_all_are_in_time_states_are_those_of_the_local_engine(toy_federation, tmp_path: Path, method: str):
    overrides = ["federation.mode=buffered", "federation.buffer_size=3", f"method.name={method}"]
    federation, _ = toy_federation(*overrides)
    assert state(federation.server) == state(local(tmp_path, *overrides).server)
    assert all(roll.answered == SITES for roll in rolls(tmp_path))


def test_a_run_that_was_killed_goes_on_and_counts_every_update_once(clocked, tmp_path: Path, monkeypatch):
    """Killed in the middle of a round, with an update in the buffer and turns under way: residuals stay right."""
