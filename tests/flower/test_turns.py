"""One turn at a time: what a slow, stopped or lost site is asked for, trains, sends and is charged."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from desks import SITES, settings
from queues import Clock, QueueGrid, at_once
from test_rounds import local, notes, rolls, state

from fedloom.flower.payload import unpack_parcel
from fedloom.records.ledger import Training, Transfer, read_rows

pytestmark = pytest.mark.flower
SLOW = ("flower.deadline=30", "flower.min_replies=2", "federation.num_rounds=5")


@pytest.fixture
def clocked(toy_federation, tmp_path, monkeypatch):
    """play(overrides, ends=…, prompt=…) → the finished server and the grid, on a clock of their own."""
    clock = Clock()
    clock.install(monkeypatch)

    def play(*overrides, ends=at_once, prompt=False, happens=(), policies=None, prepare=None, **more):
        config = settings(*overrides)
        grid = QueueGrid(config, tmp_path, policies=policies or {}, clock=clock, ends=ends, prompt=prompt)
        grid.happens = [(clock.now + after, event) for after, event in happens]
        if prepare:
            prepare(grid)
        return toy_federation(*overrides, grid=grid, **more)

    return play


def stopped(name: str, round: int, seconds: float):
    """A worker that is stopped when it begins its turn of a round, for so many seconds."""

    def ends(site, ask, number, begins):
        hit = (site, ask, number) == (name, "turn", round)
        return at_once(site, ask, number, begins) + hit * seconds

    return ends


def posted(grid: QueueGrid, site: str) -> list[tuple[str, int]]:
    return [(ask, round) for _, name, ask, round in grid.sent if name == site]


def trained(grid: QueueGrid, site: str) -> list[int]:
    """Rounds that a site trained, by its own ledger."""
    folder = next((grid.folder / site / "jobs").iterdir())
    return [row.round for row in read_rows(folder / "ledger.jsonl") if isinstance(row, Training)]


@pytest.mark.parametrize("prompt", [False, True])
def test_a_site_that_was_stopped_takes_part_in_the_very_next_round(clocked, tmp_path: Path, prompt: bool):
    federation, grid = clocked(*SLOW, ends=stopped("lab", 2, 53.0), prompt=prompt)
    assert [roll.round for roll in rolls(tmp_path) if "lab" not in roll.answered] == [2]
    turns = [(ask, round) for ask, round in posted(grid, "lab") if ask in ("turn", "withdraw")]
    assert turns == [("turn", 1), ("turn", 2), ("withdraw", 2), ("turn", 3), ("turn", 4), ("turn", 5)]
    counted = [1, 3, 4, 5] if prompt else [1, 2, 3, 4, 5]  # a plain SuperNode hears of the withdrawal when it is done
    assert trained(grid, "lab") == counted
    assert Counter(line.round for line in grid.node("lab").desk.trail.lines()) == Counter(counted)
    assert state(federation.server) == state(local(tmp_path, *SLOW, absent={2: ("lab",)}).server)
    late = [reason for roll in rolls(tmp_path) for reason in roll.late.values()]
    assert len(late) == (not prompt) and all("update of round 2 came after 54 s" in reason for reason in late)
    up = [row for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, Transfer)]
    assert sum(row.bytes for row in up if row.client == "lab" and row.direction == "up") == sum(
        line.bytes for line in grid.node("lab").desk.trail.lines()
    )


def test_a_straggler_has_one_turn_at_a_time(clocked, tmp_path: Path):
    """It needs ten times the seconds of the others, who are waited for a little only."""

    def ends(site, ask, round, begins):
        return begins + (10.0 if site == "lab" and round > 1 else 1.0) * (ask == "turn")

    rounds = ("flower.deadline=30", "flower.grace=2", "federation.num_rounds=8")
    _, plain = clocked(*rounds, ends=ends)
    assert plain.most_turns == 1
    assert len(trained(plain, "lab")) <= 4, "one turn takes as long as three rounds"


def test_a_straggler_that_heeds_withdrawals_trains_nothing_to_its_end_for_nothing(clocked, tmp_path: Path):
    def ends(site, ask, round, begins):
        return begins + (10.0 if site == "lab" and round > 1 else 1.0) * (ask == "turn")

    _, grid = clocked("flower.deadline=30", "flower.grace=2", "federation.num_rounds=8", ends=ends, prompt=True)
    assert trained(grid, "lab") == [1] and grid.most_turns == 1
    assert [roll.failed for roll in rolls(tmp_path)[1:]] == [{"lab": "did not answer in time"}] * 7
    assert not any(roll.late for roll in rolls(tmp_path)) and "withdrawn" not in notes(tmp_path)


def test_a_turn_says_how_long_it_is_worth_beginning(clocked):
    """A site that comes back in the middle of a round is told what is left of it; Flower keeps the message longer."""
    posts = []

    def prepare(grid):
        handed = grid.handed
        grid.handed = lambda message: (posts.append(message), handed(message))[1]

    clocked(*SLOW, ends=stopped("lab", 2, 53.0), prepare=prepare)
    told = [(unpack_parcel(message.content).facts, message.metadata) for message in posts]
    asked = [(facts, meta) for facts, meta in told if facts["ask"] == "turn"]
    turns = {(meta.dst_node_id, facts["round"]): (facts["expires"], meta.ttl) for facts, meta in asked}
    assert turns[101, 2] == (30.0, 90.0)
    expires, ttl = turns[103, 3]
    assert 5 <= expires <= 7 and ttl == expires + 60
    assert all("expires" not in facts for facts, _ in told if facts["ask"] != "turn")


def test_an_expired_turn_is_asked_for_again_and_is_no_failure(clocked, tmp_path: Path):
    """The node was busy with another run for so long that the turn was not worth beginning when it came to it."""

    def occupy(grid):
        work = grid.work

        def later(node):
            turns = [held for held in grid.queues.get(node.node_id, ()) if held.facts["ask"] == "turn"]
            if node.desk.site.name != "lab" or not turns or turns[0].facts["round"] != 2 or free(turns[0]):
                work(node)

        def free(turn):
            return turn.facts["expires"] < 30 or grid.clock.now > turn.sent + 31

        grid.work = later

    federation, grid = clocked("flower.deadline=30", "flower.min_replies=3", prompt=True, prepare=occupy)
    assert [roll.answered for roll in rolls(tmp_path)] == [SITES] * 3
    assert state(federation.server) == state(local(tmp_path).server)
    assert trained(grid, "lab") == [1, 2, 3]


def test_a_site_that_was_lost_is_not_waited_for_twice(clocked, tmp_path: Path):
    """Its node was started anew: what it was doing is lost, and the round goes on with it."""

    def restart(grid):
        node = grid.node("lab")
        node.last_activated_at = "second start"
        grid.queues[node.node_id].clear()

    federation, grid = clocked(*SLOW, ends=stopped("lab", 2, 20.0), happens=[(3.0, restart)])
    assert [roll.answered for roll in rolls(tmp_path)] == [SITES] * 5


def test_a_site_that_is_behind_is_named_so(clocked, tmp_path: Path):
    clocked(*SLOW, ends=stopped("lab", 2, 75.0))
    assert [roll.failed.get("lab") for roll in rolls(tmp_path)] == [
        None,
        "did not answer in time",
        "is still at its turn of round 2",
        None,
        None,
    ]
