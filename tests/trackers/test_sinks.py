"""Every tracker, through its own reader: killed anywhere and given everything again, it holds each point once.

One that is not installed is skipped, and says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.errors import ConfigError
from fedloom.trackers.points import Point
from fedloom.trackers.sinks import TRACKERS, Ending, TrackedRun, check_trackers
from tracker_stores import READERS, mlflow_runs, settle_at

POINTS = [Point(n, {"train/loss": 1 / (n + 1), "eval/loss/a b": 2.0 * n}, 1.7e9 + n) for n in range(6)]
EXPECTED = {(name, point.round): [pytest.approx(value)] for point in POINTS for name, value in point.values.items()}
pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries warn of is theirs


@pytest.fixture(scope="module", autouse=True)
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        settle_at(tmp_path_factory.mktemp("stores"), patch)
        yield


def opened(name: str, folder: Path, project: str = "fedloom", **settings: object):
    pytest.importorskip(TRACKERS[name].library, reason=f"the extra {name} is not installed")
    run = TrackedRun("0123456789abcdef", "first", project, folder, 1.7e9, settings, {"method": "fedsrd"})
    return TRACKERS[name].open(run)


def send_and_vanish(name: str, folder: Path) -> None:
    """What a process that is killed leaves: nobody says that it is over. W&B has one run a process, so it gets one."""
    first = opened(name, folder, rounds=4) if name != "wandb" else None
    if first:
        first.send(POINTS[:2])
        first.send(POINTS[:4])
        return
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    code = (
        "import os, sys; from pathlib import Path; import test_sinks as t\n"
        "t.opened('wandb', Path(sys.argv[1]), rounds=4).send(t.POINTS[:4]); os._exit(9)"
    )
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 9


@pytest.mark.parametrize("name", TRACKERS)
def test_points_that_are_given_again_stand_once(name: str, tmp_path: Path):
    send_and_vanish(name, tmp_path)
    again = opened(name, tmp_path, rounds=6)  # a setting may change when a run goes on
    again.send(POINTS)
    again.send(POINTS)
    again.end(Ending("finished", sums={"bytes_up": 7}))
    assert READERS[name](tmp_path) == EXPECTED
    later = opened(name, tmp_path, rounds=6)
    later.send(POINTS)
    later.end(Ending("failed", "the disk is full"))
    assert READERS[name](tmp_path) == EXPECTED


def test_mlflow_has_one_run_with_settings_and_an_end(tmp_path: Path):
    opened("mlflow", tmp_path, "second", **{"lora.r": 8}).send(POINTS[:1])
    again = opened("mlflow", tmp_path, "second", **{"lora.r": 16})
    (run,) = mlflow_runs("second")
    assert run.info.status == "RUNNING" and run.data.params == {"lora.r": "8"}
    assert run.data.tags["now.lora.r"] == "16", "parameters cannot change"
    # What a batch that was cut short has left: one number of the round is there.
    again.send([Point(1, {"train/loss": POINTS[1].values["train/loss"]}, POINTS[1].time)])
    again.send(POINTS)
    again.end(Ending("interrupted", "its process ended without a word"))
    assert READERS["mlflow"](tmp_path, "second") == EXPECTED
    (run,) = mlflow_runs("second")
    assert run.info.status == "KILLED" and run.data.tags["fedloom.reason"] == "its process ended without a word"


def test_an_event_file_that_was_cut_short_is_written_anew(tmp_path: Path):
    opened("tensorboard", tmp_path).send(POINTS)
    (file,) = (tmp_path / "tensorboard").iterdir()
    for size in (0, 5, file.stat().st_size // 2, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:size])
        opened("tensorboard", tmp_path).send(POINTS)
        (file,) = (tmp_path / "tensorboard").iterdir()
        assert READERS["tensorboard"](tmp_path) == EXPECTED


def test_a_tracker_that_is_not_there_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedloom.trackers.sinks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'output.report_to names \'mlflow\'.*pip install "fedloom\[mlflow\]"'):
        check_trackers(["mlflow"])
    with pytest.raises(ConfigError, match="names 'neptune': expected some of tensorboard, mlflow, wandb, trackio"):
        check_trackers(["neptune"])
