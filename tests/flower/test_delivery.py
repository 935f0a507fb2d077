"""The result reaches every site that is there, whatever `grace` says, and a crash meanwhile undoes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from desks import LOST, SITES, settings
from queues import Clock, QueueGrid
from test_rounds import Crash, local, notes, state

from fedloom.flower.sites import FlowerSites
from fedloom.records.ledger import Transfer, read_rows, totals
from fedloom.site.protocol import Parcel

pytestmark = pytest.mark.flower
UNCONFIRMED = "has not confirmed that it received the result"


def holds(grid, name: str) -> bool:
    return any((grid.folder / name / "jobs").glob("*/adapter/adapter_model.safetensors"))


def test_a_site_that_is_slow_to_take_the_result_is_waited_for(toy_federation, tmp_path, monkeypatch):
    """A grace of a second is about updates; writing an adapter of some size takes longer. Who is away is noted."""
    clock = Clock()
    clock.install(monkeypatch)
    overrides = ("flower.deadline=100", "flower.grace=1", "federation.num_rounds=1", "flower.min_replies=1")

    def ends(site, ask, round, begins):
        return begins + {"turn": 1.0, "deliver": 50.0}.get(ask, 0.0)

    grid = QueueGrid(settings(*overrides), tmp_path, clock=clock, ends=ends)
    grid.happens = [(1001.5, lambda grid: setattr(grid.node("lab"), "status", "offline"))]
    toy_federation(*overrides, grid=grid)
    assert [holds(grid, name) for name in SITES] == [True, True, False]
    assert notes(tmp_path).count(UNCONFIRMED) == 1
    assert f"client lab {UNCONFIRMED}: is not connected" in notes(tmp_path)
    assert clock.now < 1100, "nobody waits for who is away"


def test_a_site_that_is_there_for_longer_than_the_deadline_is_noted(toy_federation, tmp_path, monkeypatch):
    clock = Clock()
    clock.install(monkeypatch)
    overrides = ("flower.deadline=20", "federation.num_rounds=1")

    def ends(site, ask, round, begins):
        return begins + {"turn": 1.0, "deliver": 50.0 * (site == "lab")}.get(ask, 0.0)

    toy_federation(*overrides, grid=QueueGrid(settings(*overrides), tmp_path, clock=clock, ends=ends))
    assert f"client lab {UNCONFIRMED}: did not answer within 20 s" in notes(tmp_path)


def test_a_result_that_was_lost_on_the_way_is_sent_again_and_an_error_is_told(toy_federation, tmp_path: Path):
    times = iter(range(1000))

    def disturb(node, ask, round, reply):
        if ask != "deliver" or node.desk.site.name == "depot":
            return "as it is"
        if node.desk.site.name == "bank":
            return Parcel({"error": "the disk is full"})
        return LOST if next(times) == 0 else "as it is"

    _, grid = toy_federation("federation.num_rounds=1", disturb=disturb)
    assert grid.log.count(("lab", "deliver", 1)) == 2 and grid.log.count(("bank", "deliver", 1)) == 1
    assert f"client bank {UNCONFIRMED}: the disk is full" in notes(tmp_path) and "client lab" not in notes(tmp_path)


def test_a_server_that_dies_while_it_delivers_plays_no_round_again(toy_federation, tmp_path, monkeypatch):
    send, calls = FlowerSites.send, []

    def crash(self, rounds, site, ask, *more):
        send(self, rounds, site, ask, *more)
        calls.append(ask)
        if calls.count("deliver") == 2:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(FlowerSites, "send", crash)
        with pytest.raises(Crash):
            toy_federation()
    federation, grid = toy_federation(resume=True)
    assert {ask for _, ask, _ in grid.log} == {"hello", "deliver"}
    assert state(federation.server) == state(local(tmp_path).server)
    for name in SITES:
        assert state(grid.node(name).desk.held.after) == state(federation.server) and holds(grid, name)
    rows = [row for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, Transfer) and row.delivery]
    assert [row.client for row in rows if row.undone] == ["bank", "depot"]
    assert sorted(row.client for row in rows if not row.undone)[-1] == "lab"


def test_a_site_that_was_away_at_the_end_gets_the_result_when_the_run_is_started_again(toy_federation, tmp_path: Path):
    def leave(node, ask, round, reply):
        if (node.desk.site.name, ask, round) == ("lab", "turn", 3):
            node.status = "offline"
        return "as it is"

    _, grid = toy_federation(disturb=leave)
    assert f"client lab {UNCONFIRMED}" in notes(tmp_path) and not holds(grid, "lab")
    sums = totals(read_rows(tmp_path / "run" / "ledger.jsonl"))
    _, later = toy_federation(resume=True)
    assert [name for name, ask, _ in later.log if ask == "deliver"] == ["lab"] and holds(later, "lab")
    assert totals(read_rows(tmp_path / "run" / "ledger.jsonl")).transfers == sums.transfers + 1
    _, again = toy_federation(resume=True)
    assert again.log == [], "everybody has it"
