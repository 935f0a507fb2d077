"""A run's folder as it grows: what is settled is told once, whatever moment the run was killed at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedloom.records.config import Config
from fedloom.records.configfile import parse
from fedloom.records.events import Silent
from fedloom.records.ledger import Ledger, Transfer
from fedloom.records.session import End, Session
from fedloom.report.numbers import summarise
from fedloom.trackers import outlets
from fedloom.trackers.follow import RunFollower, identify, read_settings, read_settled
from fedloom.trackers.outlets import Destination, follow_run, take_turn
from fedloom.trackers.sinks import Tracker
from toy import initial
from toy_run import simulation, toy_setup
from tracker_stores import read_tensorboard

CLIENTS = ["client-0000", "client-0001", "client-0002"]


def config(rounds: int = 4, **output: object) -> Config:
    federation = {"num_rounds": rounds, "participants": CLIENTS}
    return parse(
        {"model": {"path": "toy"}, "federation": federation, "training": {"max_steps": 1}, "output": output}, ""
    )


class Copies(Silent):
    """Copies the run's folder at every event: what a process that is killed then leaves."""

    def __init__(self, run: Path, out: Path) -> None:
        self.run, self.out, self.copies = run, out, []

    def _copy(self) -> None:
        self.copies.append(self.out / f"{len(self.copies):03d}")
        shutil.copytree(self.run, self.copies[-1])

    def client_started(self, *facts: object) -> None:
        self._copy()

    def client_finished(self, *facts: object) -> None:
        self._copy()

    def round_finished(self, *facts: object) -> None:
        self._copy()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A finished run, and its folder as it was at every moment before."""
    folder = tmp_path_factory.mktemp("killed")
    watch = Copies(folder / "run", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedloom.workspace.export.write_report", lambda folder, rows: summarise(rows))
        with simulation(toy_setup(config(), 3, initial()), folder / "run", watch) as rounds:
            rounds.play(resume=False)
    return folder / "run", watch.copies


def told(folder: Path) -> dict[int, dict[str, float]]:
    follower = RunFollower(folder)
    follower.look()
    return {point.round: dict(point.values) for point in follower.points}


def test_nothing_is_told_that_may_be_undone(killed: tuple[Path, list[Path]]):
    whole, copies = killed
    everything = told(whole)
    assert list(everything) == [0, 1, 2, 3, 4] or list(everything) == [1, 2, 3, 4]
    seen = set()
    for copy in copies:
        found = told(copy)
        settled, rows = read_settled(copy / "checkpoints")
        assert list(found) == [round for round in everything if round <= settled]
        assert all(found[round] == everything[round] for round in found)
        seen.add((settled, rows))
    assert len(seen) > 3 and len(copies) > 20


def test_killed_at_every_moment_tensorboard_holds_each_point_once(killed: tuple[Path, list[Path]], tmp_path: Path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    whole, copies = killed
    to = Destination(("tensorboard",), "fedloom")
    expected = {(name, round) for round, values in told(whole).items() for name in values}
    for copy in copies[::3]:
        run = tmp_path / copy.name
        shutil.copytree(copy, run)
        assert follow_run(run, to, lambda: True) == []
        for name in ("ledger.jsonl", "log.jsonl"):  # the run went on, and is over
            shutil.copyfile(whole / name, run / name)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        shutil.copytree(whole / "checkpoints", run / "checkpoints")
        assert follow_run(run, to, lambda: True) == []
        held = read_tensorboard(run)
        assert held.keys() == expected and {len(values) for values in held.values()} == {1}


class Picky:
    """A tracker that takes points only from its second opening on."""

    opened, ended, held = 0, [], {}

    def __init__(self, run) -> None:
        Picky.opened += 1

    def send(self, points) -> None:
        if Picky.opened < 2:
            raise OSError("the server\nis off")
        Picky.held |= {point.round: point for point in points}

    def end(self, ending) -> None:
        Picky.ended.append(ending)


def test_a_tracker_that_fails_is_named_once_and_gets_the_rest_later(
    killed: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
):
    whole, _ = killed
    Picky.opened, Picky.ended, Picky.held = 0, [], {}
    monkeypatch.setattr(outlets, "RETRY_SECONDS", 1e9)
    monkeypatch.setitem(outlets.TRACKERS, "tensorboard", type("T", (), {"title": "Picky", "open": staticmethod(Picky)}))
    said, looks = [], iter([False, False, True])
    assert follow_run(whole, Destination(("tensorboard",), "p"), lambda: next(looks), said.append) == []
    assert said == [r"Picky takes no points: the server\nis off"]
    assert Picky.opened == 2 and list(Picky.held) == list(told(whole)), "tried again at the end, all from the start"
    assert [end.status for end in Picky.ended] == ["finished"]


def test_a_tracker_that_stays_off_is_told_of(killed: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch):
    def off(run):
        raise ConnectionError("no route")

    monkeypatch.setitem(outlets.TRACKERS, "tensorboard", type("T", (), {"title": "Off", "open": staticmethod(off)}))
    said = []
    assert follow_run(killed[0], Destination(("tensorboard",), "p"), lambda: True, said.append) == ["tensorboard"]
    assert said == ["Off takes no points: no route"]


def test_what_has_no_end_was_interrupted(killed: tuple[Path, list[Path]], tmp_path: Path):
    follower = RunFollower(killed[1][-1])
    follower.look()
    assert (follower.judge().status, follower.judge().reason) == ("interrupted", "its process ended without a word")
    whole = RunFollower(killed[0])
    whole.look()
    assert whole.judge().status == "finished" and whole.judge().sums["rounds"] == 4


def test_a_ledger_that_is_cut_back_is_read_anew(killed: tuple[Path, list[Path]], tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(killed[0], run)
    follower = RunFollower(run)
    follower.look()
    before = {point.round: point.values for point in follower.points}
    _, rows = read_settled(run / "checkpoints")
    with Ledger(run / "ledger.jsonl") as ledger:
        ledger.truncate_to(rows)
        ledger.append(Transfer(4, CLIENTS[0], "down", "full", 5, delivery=True))
        ledger.append(End(4, "failed", "the disk is full"))
    follower.look()
    assert {point.round: point.values for point in follower.points} == before
    assert follower.judge().reason == "the disk is full"


def test_no_site_and_no_address_is_among_the_settings(killed: tuple[Path, list[Path]]):
    settings = (
        '[model]\npath = "base"\n[federation]\nnum_rounds = 3\nparticipants = ["st-mary"]\n'
        '[federation.pace]\n"st-mary" = 2.0\n[clients."st-mary"]\nr = 4\n[flower]\naddress = "10.0.0.1:1"\n'
    )
    assert read_settings(Session(0, "", settings)) == {"model.path": "base", "federation.num_rounds": 3}
    follower = RunFollower(killed[0])
    follower.look()
    run = follower.describe("fedloom")
    assert run.settings["method.name"] == "fedsrd" and run.name == "run"
    assert not any(client in f"{run.settings}{run.facts}" for client in CLIENTS)


def test_the_identifier_stays_and_only_one_sends(tmp_path: Path):
    assert identify(tmp_path) == identify(tmp_path) != ""
    with take_turn(tmp_path, lambda: False):
        assert take_turn(tmp_path, lambda: False) is None
    with take_turn(tmp_path, lambda: False) as lock:
        assert not lock.closed


def test_the_table_opens_by_name():
    assert isinstance(outlets.TRACKERS["mlflow"], Tracker)
