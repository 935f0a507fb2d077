"""Asynchronous rounds over the grid: a slow site keeps nobody waiting, and its update counts when it comes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from desks import SITES, settings
from queues import Clock, QueueGrid, at_once
from test_rounds import Crash, local, notes, rolls, state

from fedloom.errors import ConfigError, RoundError
from fedloom.flower.filling import Filling
from fedloom.flower.settings import check_flower_settings, join_settings, server_settings, shared_settings
from fedloom.records.ledger import Aggregation, Training, read_rows
from fedloom.server.buffer import Buffer
from fedloom.site.protocol import Parcel
from toy_run import check_nothing_is_lost, counted

pytestmark = pytest.mark.flower
RESIDUAL = ("method.client_residual=1.0", "method.rescale=none")
BUFFERED = ("federation.mode=buffered", "federation.buffer_size=2", "federation.num_rounds=8", "flower.deadline=100")


@pytest.fixture
def clocked(toy_federation, tmp_path, monkeypatch):
    """play(overrides, ends=…) → the finished server and the grid, on a clock of their own."""
    clock = Clock()
    clock.install(monkeypatch)

    def play(*overrides, ends=at_once, prepare=lambda grid: None, **more):
        grid = QueueGrid(settings(*overrides), tmp_path, clock=clock, ends=ends, prompt=True)
        prepare(grid)
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
        gaps = [after - before for before, after in pairwise(began[site])]
        assert max(gaps) <= 1.0 + 4 * 0.25, "a turn of a second, and a few looks for replies"
    counted = [row.client for row in rows(tmp_path, Training)]
    assert counted.count("lab") >= 1 and len(counted) >= 15
    stale = [step.stats["max_staleness"] for step in rows(tmp_path, Aggregation)]
    assert max(stale) >= 4 and "refused" not in notes(tmp_path)
    assert federation.server.version == 8
    held = [grid.node(site).desk.held.after for site in SITES]
    assert {(one.version, one.digest) for one in held} == {(federation.server.version, federation.server.digest)}


@pytest.mark.parametrize("method", ["fedsrd", "fedit"])
def test_where_all_are_in_time_states_are_those_of_the_local_engine(toy_federation, tmp_path: Path, method: str):
    overrides = ["federation.mode=buffered", "federation.buffer_size=3", f"method.name={method}"]
    federation, _ = toy_federation(*overrides)
    assert state(federation.server) == state(local(tmp_path, *overrides).server)
    assert all(roll.answered == SITES for roll in rolls(tmp_path))


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(toy_federation, tmp_path: Path, monkeypatch):
    """Killed with one update of three in the buffer: who answered says the same again, and nothing counts twice."""
    overrides = [
        "federation.mode=buffered",
        "federation.buffer_size=3",
        "method.name=fedsrd",
        "method.client_residual=0.9",
    ]
    whole, take_in = local(tmp_path, *overrides), Buffer.take_in
    for number, moment in enumerate((4, 5)):
        calls = iter(range(1000))

        def crash(self, *arguments, calls=calls, moment=moment):
            if next(calls) == moment:
                raise Crash
            take_in(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Buffer, "take_in", crash)
            with pytest.raises(Crash):
                toy_federation(*overrides, resume=number > 0)
    federation, grid = toy_federation(*overrides, resume=True)
    assert state(federation.server) == state(whole.server)
    for site in SITES:
        held, twin = grid.node(site).desk.held.after.memory, whole.sites.states[site].memory
        assert held.keys() == twin.keys() and all(torch.equal(held[name], twin[name]) for name in twin)


@pytest.mark.parametrize("after", [0, 1])
def test_what_a_slow_site_keeps_back_is_right_after_a_crash(clocked, tmp_path: Path, monkeypatch, after: int):
    """Killed once the slow site's update waits or is in a step; the site, at its next turn, ends it alone."""
    overrides = [*BUFFERED, "federation.num_rounds=9", "method.name=fedsrd", *RESIDUAL]
    found, begin, asked, grids = counted(monkeypatch), Filling.begin, [], []

    def crash(self, site):
        begin(self, site)
        if site == "lab" and self.round > 3:
            asked.append(self.round)
        if asked and self.round == asked[0] + after:
            grids[0].clock.now += 50.0
            grids[0].advance()
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Filling, "begin", crash)
        with pytest.raises(Crash):
            clocked(*overrides, ends=paced(lab=5.5), prepare=grids.append)
    federation, grid = clocked(*overrides, resume=True)
    assert ("lab", "turn", asked[0]) in grids[0].log and federation.server.version == 9
    for one in federation.buffer.waiting:
        found.setdefault(one.client, []).append(one.payload)
    assert len(found["lab"]) >= 2
    for site in SITES:
        check_nothing_is_lost(federation.setup, site, found[site], grid.node(site).desk.held.after.memory)


def test_a_site_that_is_lost_is_asked_anew_and_one_that_refuses_once_a_round(clocked, tmp_path: Path):
    def disturbed(grid):
        answer = grid.node("depot").desk.answer
        grid.node("depot").desk.answer = lambda parcel, waited=0.0: (
            Parcel({"error": "not today", "protocol": 2}) if parcel.facts["ask"] == "turn" else answer(parcel, waited)
        )
        grid.happens = [(1003.0, lambda grid: setattr(grid.node("lab"), "last_activated_at", "second start"))]

    federation, grid = clocked(*BUFFERED, "federation.num_rounds=4", prepare=disturbed)
    assert federation.server.version == 4
    asked = [round for _, site, ask, round in grid.sent if (site, ask) == ("depot", "turn")]
    assert asked == sorted(set(asked)) and "client depot: not today" in notes(tmp_path)
    assert all("depot" not in roll.answered and roll.failed["depot"] == "not today" for roll in rolls(tmp_path))


def test_a_step_is_taken_with_fewer_at_the_deadline_and_not_below_min_replies(clocked, tmp_path: Path):
    rules = [*BUFFERED, "federation.buffer_size=3", "federation.num_rounds=2", "flower.deadline=10"]
    clocked(*rules, ends=paced(lab=1e6))
    assert [roll.answered for roll in rolls(tmp_path)] == [("bank", "depot")] * 2
    with pytest.raises(RoundError, match=r"2 updates came in in 2 tries, .*lab: is still at its turn.*go on with"):
        clocked(*rules, "flower.min_replies=3", ends=paced(lab=1e6), out="other")


def test_the_sites_are_told_nothing_of_it():
    """So a site of the release before takes part; and what the server is told comes back whole."""
    config = settings(*BUFFERED, "federation.staleness_exponent=1", "federation.max_staleness=7")
    assert shared_settings(config) == shared_settings(settings("federation.num_rounds=8"))
    assert join_settings(shared_settings(config), server_settings(config)).federation == config.federation
    with pytest.raises(ConfigError, match=r"federation\.pace is for simulations"):
        check_flower_settings(settings(*BUFFERED, 'federation.pace={"lab" = 2.0}'))
