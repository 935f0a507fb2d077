"""A run that MLflow and TensorBoard track at once, with real processes: killed in the middle of a round and resumed, no
point stands there twice and none is missing.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fedloom.records.configfile import parse
from fedloom.records.events import Silent
from fedloom.report.numbers import summarise
from fedloom.trackers.follow import RunFollower
from toy import initial
from toy_run import simulation, toy_setup
from tracker_stores import mlflow_runs, read_mlflow, read_tensorboard, settle_at

CONFIG = {
    "model": {"path": "toy"},
    "federation": {"num_rounds": 5},
    "training": {"max_steps": 1},
    "output": {"report_to": ["tensorboard", "mlflow"], "run_name": "twice begun"},
}


class KilledInRoundFour(Silent):
    def client_finished(self, round: int, client: str, *facts: object) -> None:
        if round == 4 and client.endswith("1"):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore")  # what MLflow's libraries warn of is theirs
def test_killed_and_resumed_every_point_stands_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for library in ("tensorboard", "mlflow"):
        pytest.importorskip(library, reason=f"the extra {library} is not installed")
    settle_at(tmp_path, monkeypatch)
    monkeypatch.setattr("fedloom.workspace.export.write_report", lambda folder, rows: summarise(rows))
    monkeypatch.setattr("fedloom.trackers.process.PATIENCE", 300.0)
    config, run, said = parse(CONFIG, "the test"), tmp_path / "run", []
    process = os.fork()
    if not process:
        try:
            with simulation(toy_setup(config, 3, initial()), run, KilledInRoundFour()) as rounds:
                rounds.play(resume=False)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    with simulation(toy_setup(config, 3, initial()), run, resume=True) as rounds:
        monkeypatch.setattr(rounds.observer, "noted", lambda round, text: said.append(text), raising=False)
        rounds.play(resume=True)
    assert [text for text in said if "points" in text or "missing" in text] == []
    follower = RunFollower(run)
    follower.look()
    expected = {(name, point.round): point.values[name] for point in follower.points for name in point.values}
    assert {round for _, round in expected} == {1, 2, 3, 4, 5}
    for held in (read_tensorboard(run), read_mlflow(run)):
        assert held.keys() == expected.keys()
        for key, values in held.items():
            assert values == [pytest.approx(expected[key], rel=1e-6)], key
    (told,) = mlflow_runs()
    assert (told.info.status, told.info.run_name) == ("FINISHED", "twice begun")
    assert told.data.tags["fedloom.state"] == "finished" and told.data.params["federation.num_rounds"] == "5"
