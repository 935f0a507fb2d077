"""`fedloom track`: a run that is over, sent afterwards, is what it would have been live."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedloom.cli import handing
from fedloom.cli.main import app
from fedloom.errors import CheckpointError, ConfigError
from fedloom.records.configfile import parse
from fedloom.report.numbers import summarise
from fedloom.trackers.outlets import take_turn
from toy import initial
from toy_run import simulation, toy_setup
from tracker_stores import read_tensorboard


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handing") / "run"
    tables = {"model": {"path": "toy"}, "federation": {"num_rounds": 2}, "training": {"max_steps": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedloom.workspace.export.write_report", lambda folder, rows: summarise(rows))
        with simulation(toy_setup(parse(tables, ""), 2, initial()), folder) as rounds:
            rounds.play(resume=False)
    return folder


def track(*words: str):
    return CliRunner().invoke(app, ["track", *words])


def test_a_run_that_is_over_is_sent_afterwards_and_again(run: Path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    for _ in range(2):
        done = track(str(run), "--to", "tensorboard")
        assert done.exit_code == 0 and f"sent {run} to tensorboard" in done.output.replace("\n", ""), done.output
    held = read_tensorboard(run)
    assert {round for _, round in held} == {1, 2} and {len(values) for values in held.values()} == {1}


def test_what_cannot_be_tracked_is_told_in_words(run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="its settings name no tracker; give some, such as --to tensorboard,mlflow"):
        handing.track([run])
    with pytest.raises(ConfigError, match="--to names 'neptune': expected some of tensorboard"):
        handing.track([run], "neptune")
    with pytest.raises(ConfigError, match="--run-name is for one run"):
        handing.track([run, run], "tensorboard", None, "first")
    with pytest.raises(CheckpointError, match="no such file; expected the folder of a run"):
        handing.track([tmp_path], "tensorboard")
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    with take_turn(run, lambda: False), pytest.raises(CheckpointError, match="another process sends the points"):
        handing.track([run], "tensorboard")
