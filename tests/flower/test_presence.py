"""Who is there, who is missing and why: by name, in the ledger, when it changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from desks import SITES, DeskGrid, settings
from queues import Clock, QueueGrid
from test_rounds import notes, rolls

from fedloom.errors import RoundError
from fedloom.records.ledger import Presence, read_rows
from fedloom.site.protocol import Parcel
from fedloom.site.rules import Policy

pytestmark = pytest.mark.flower
REFUSING = {"lab": Policy(methods=("fedit",))}
THERE = "is there but cannot take part: refused by the site's policy: method 'fedsrd' is not allowed"


def presence(tmp_path: Path, out: str = "run") -> list[Presence]:
    return [row for row in read_rows(tmp_path / out / "ledger.jsonl") if isinstance(row, Presence)]


def test_a_run_in_which_everybody_is_there_says_so_once(toy_federation, tmp_path: Path):
    toy_federation()
    assert presence(tmp_path) == [Presence(1, SITES, {})]


@pytest.mark.parametrize("registered", [True, False])
def test_a_site_that_refuses_is_known_by_name_and_is_there(toy_federation, tmp_path: Path, registered: bool):
    grid = DeskGrid(settings(), tmp_path, policies=REFUSING)
    for node in grid.nodes if registered else ():
        node.name = node.desk.site.name
    toy_federation("flower.grace=0.01", grid=grid)
    assert f"client lab cannot take part: {THERE.partition('part: ')[2]}" in notes(tmp_path)
    assert notes(tmp_path).count("cannot take part") == 5, "when it refuses, in each round, at the end"
    assert all(roll.failed["lab"].startswith(THERE) for roll in rolls(tmp_path)) and len(rolls(tmp_path)) == 3
    (row,) = presence(tmp_path)
    assert row.online == ("bank", "depot") and row.missing["lab"].startswith(THERE)


def test_a_site_of_another_protocol_is_known_by_name(toy_federation, tmp_path: Path):
    def ancient(node, ask, round, reply):
        words = "the server speaks protocol 2, this site 0: update the site"
        hit = node.desk.site.name == "lab"
        return Parcel({"error": words, "protocol": 0, "name": "lab"}) if hit else "as it is"

    toy_federation("flower.grace=0.01", disturb=ancient)
    assert "client lab cannot take part: the site speaks protocol 0" in notes(tmp_path)
    assert "node 103" not in notes(tmp_path)


def test_a_name_that_is_somebody_elses_is_not_believed_from_a_refusal(toy_federation, tmp_path: Path):
    def pretend(node, ask, round, reply):
        hit = node.desk.site.name == "lab"
        return Parcel({"error": "no", "protocol": 2, "name": "bank"}) if hit else "as it is"

    grid = DeskGrid(settings(), tmp_path, pretend)
    grid.node("bank").name = "bank"
    toy_federation("flower.grace=0.01", grid=grid)
    assert "node 103 cannot take part: no" in notes(tmp_path) and "client bank cannot" not in notes(tmp_path)


def test_too_few_sites_are_named_with_what_keeps_each_of_them(toy_federation, tmp_path: Path):
    grid = DeskGrid(settings(), tmp_path, policies=REFUSING)
    grid.node("depot").status = "offline"
    with pytest.raises(RoundError, match="1 of 3 sites are there") as stopped:
        toy_federation("flower.deadline=0.05", grid=grid)
    assert "client depot: is not connected; client lab: is there but cannot take part: refused by" in str(stopped.value)


def test_who_is_missing_is_a_row_when_it_changes_and_not_at_every_look(toy_federation, tmp_path, monkeypatch):
    """At the start, where the run waits for a site, and in the middle of a round."""
    clock = Clock()
    clock.install(monkeypatch)
    overrides = ("flower.deadline=600", "flower.min_replies=2", "federation.num_rounds=2")

    def to(status: str):
        return lambda grid: setattr(grid.node("lab"), "status", status)

    def ends(site, ask, round, begins):
        return begins + 60.0 * (ask == "turn")

    grid = QueueGrid(settings(*overrides), tmp_path, clock=clock, ends=ends)
    grid.node("lab").status = "offline"
    grid.happens = [(1050.0, to("online")), (1090.0, to("offline")), (1115.0, to("online"))]
    toy_federation(*overrides, grid=grid)
    away, there = Presence(1, ("bank", "depot"), {"lab": "is not connected"}), Presence(1, SITES, {})
    assert presence(tmp_path) == [away, there, away, there]


def test_a_refusal_that_is_repeated_with_another_reference_is_no_change(toy_federation, tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.flower.fleet.GREET_SECONDS", 0.0)
    _, grid = toy_federation("flower.grace=0.05", policies=REFUSING)
    assert grid.log.count(("lab", "hello", 0)) > 2
    assert len(presence(tmp_path)) == 1 and len({roll.failed["lab"] for roll in rolls(tmp_path)}) == 1


def test_a_node_that_was_started_anew_is_greeted_at_once(toy_federation, tmp_path: Path):
    """Its operator has mended what kept it away, and need not wait for half a minute."""
    times = iter(range(1000))

    def mended(node, ask, round, reply):
        if node.desk.site.name == "lab" and ask == "hello" and next(times) == 0:
            return Parcel({"error": "no data yet"})
        if node.desk.site.name == "bank" and (ask, round) == ("turn", 1):
            grid.node("lab").last_activated_at = "second start"
        return "as it is"

    grid = DeskGrid(settings(), tmp_path, mended)
    toy_federation("flower.grace=0.3", grid=grid)
    assert "lab" in rolls(tmp_path)[-1].answered
