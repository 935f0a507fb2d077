"""What a crash undoes, and what it does not: bytes that have left are counted, full disks leave all in order."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from desks import SITES, DeskGrid, settings
from safetensors import SafetensorError
from test_rounds import Crash, local, rolls, state

import toy
from fedloom.errors import CheckpointError, RoundError
from fedloom.flower.sites import FlowerSites
from fedloom.records.ledger import Training, Transfer, read_rows, totals
from fedloom.records.session import End
from fedloom.report import summarise
from fedloom.report.metrics import prometheus_text
from fedloom.server.disk import explain_full_disk
from fedloom.site import store
from fedloom.workspace import checkpoint
from fedloom.workspace.folder import RunFolder

pytestmark = pytest.mark.flower


def carried(grids) -> dict[str, int]:
    """Bytes by site that the grids have carried down."""
    return {name: sum(size for grid in grids for site, _, size in grid.carried if site == name) for name in SITES}


def transfers(tmp_path: Path, out: str = "run") -> list[Transfer]:
    return [row for row in read_rows(tmp_path / out / "ledger.jsonl") if isinstance(row, Transfer)]


@pytest.mark.parametrize("crashes", [1, 2])
def test_bytes_that_left_before_a_crash_stay_counted(toy_federation, tmp_path, monkeypatch, crashes: int):
    """The server dies after it has asked two of three sites for round 2, once or twice."""
    send, grids = FlowerSites.send, []

    def crash(self, rounds, site, *more):
        send(self, rounds, site, *more)
        if (rounds.round, site) == (2, "depot"):
            raise Crash

    for number in range(crashes):
        grids.append(DeskGrid(settings(), tmp_path))
        with monkeypatch.context() as patch:
            patch.setattr(FlowerSites, "send", crash)
            with pytest.raises(Crash):
                toy_federation(grid=grids[-1], resume=number > 0)
    federation, grid = toy_federation(resume=True)
    down = carried([*grids, grid])
    assert state(federation.server) == state(local(tmp_path).server)
    sums = totals(read_rows(tmp_path / "run" / "ledger.jsonl"))
    undone = [row for row in transfers(tmp_path) if row.undone]
    assert {name: both[1] for name, both in sums.by_client.items()} == down
    assert [row.client for row in undone] == ["bank", "depot"], "they have it, and are not sent it again"
    assert {(row.round, row.direction) for row in undone} == {(2, "down")}
    text = prometheus_text(read_rows(tmp_path / "run" / "ledger.jsonl"), "run", 0.0)
    for name in SITES:
        assert f'site="{name}",direction="down"}} {down[name]}' in text
    assert [roll.answered for roll in rolls(tmp_path)] == [SITES] * 3


def test_updates_that_came_before_a_crash_stay_counted(toy_federation, tmp_path, monkeypatch):
    original, calls = RunFolder.save, iter(range(1000))

    def crash(self, snapshot):
        if next(calls) == 2:
            raise Crash
        original(self, snapshot)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", crash)
        with pytest.raises(Crash):
            toy_federation()
    toy_federation(resume=True)
    whole = local(tmp_path)
    first, undisturbed = (totals(read_rows(tmp_path / out / "ledger.jsonl")) for out in ("run", "local"))
    sizes = {row.client: row.bytes for row in transfers(tmp_path, "local") if (row.round, row.direction) == (2, "up")}
    for name in SITES:
        assert first.by_client[name][0] == undisturbed.by_client[name][0] + sizes[name]
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    assert len([row for row in rows if isinstance(row, Training)]) == 9, "a turn is counted once"
    assert sum(row.undone for row in transfers(tmp_path)) == 6
    assert summarise(rows).totals.bytes == first.bytes > undisturbed.bytes
    assert whole.server.version == 3


def test_the_local_engine_counts_a_round_once_however_often_it_is_played(tmp_path, monkeypatch):
    """Nothing was sent to anybody: the totals are those of an undisturbed run."""
    original, calls = RunFolder.save, iter(range(1000))

    def crash(self, snapshot):
        if next(calls) == 2:
            raise Crash
        original(self, snapshot)

    monkeypatch.setattr("fedloom.server.loop.finish_run", lambda *arguments: None)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", crash)
        with pytest.raises(Crash):
            local(tmp_path)
    local(tmp_path, resume=True)
    local(tmp_path, out="whole")
    assert totals(read_rows(tmp_path / "local" / "ledger.jsonl")) == totals(
        read_rows(tmp_path / "whole" / "ledger.jsonl")
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_server_whose_disk_is_full_says_what_to_do(toy_federation, tmp_path, monkeypatch, error):
    saved = []

    def full(folder, snapshot, keys):
        saved.append(snapshot.round)
        if snapshot.round == 2:
            raise error
        return save(folder, snapshot, keys)

    save = checkpoint.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", full)
        with pytest.raises(CheckpointError, match="is full: make room, then go on with --resume"):
            toy_federation()
    end = read_rows(tmp_path / "run" / "ledger.jsonl")[-1]
    assert isinstance(end, End) and end.status == "failed" and "--resume" in end.reason
    federation, _ = toy_federation(resume=True)
    assert state(federation.server) == state(local(tmp_path).server)


def test_a_sites_full_disk_is_not_taken_for_the_servers():
    told = RoundError("round 3: 1 of 3 sites answered (lab: OSError: [Errno 28] No space left on device)")
    assert explain_full_disk(told, Path("run")) is None


def test_a_site_whose_disk_is_full_keeps_a_round_once_and_does_not_train_it_in_vain(
    toy_federation, tmp_path, monkeypatch
):
    """The first save of round 2 fails; until there is room, it refuses before it trains. Then it is kept once."""
    save, free, tried = store.save_contents, [10**9], []

    def full(folder, round, contents):
        if "lab" in folder.parts and round == 2 and free[0] == 10**9:
            free[0] = 1000
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(folder, round, contents)

    def disturb(node, ask, round, reply):
        if (node.desk.site.name, ask, round) == ("lab", "turn", 2):
            folder = next((tmp_path / "lab" / "jobs").iterdir())
            tried.append([row.round for row in read_rows(folder / "ledger.jsonl") if isinstance(row, Training)])
            if len(tried) == 2:
                free[0] = 10**12
        return "as it is"

    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr("fedloom.site.policy.shutil.disk_usage", lambda path: usage(10**12, 0, free[0]))
    monkeypatch.setattr(store, "save_contents", full)
    steps, step = [], toy.step
    monkeypatch.setattr(toy, "step", lambda state, round, seed, **more: steps.append(round) or step(state, round, seed))
    federation, grid = toy_federation("flower.retries=3", "flower.min_replies=3", disturb=disturb)
    assert tried[:2] == [[1], [1]], "no row without its record"
    assert steps.count(2) == 3 + 1, "the round was trained in vain once"
    folder = next((tmp_path / "lab" / "jobs").iterdir())
    rows = read_rows(folder / "ledger.jsonl")
    assert [row.round for row in rows if isinstance(row, Training)] == [1, 2, 3]
    ups = [row for row in rows if isinstance(row, Transfer) and row.direction == "up"]
    assert sum(row.bytes for row in ups) == sum(line.bytes for line in grid.node("lab").desk.trail.lines())
    assert state(federation.server) == state(local(tmp_path).server)
