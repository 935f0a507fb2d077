"""The time that `fedloom compare` states before it starts."""

from pathlib import Path

import pytest

from fedloom.records.configfile import load_config
from fedloom.studies import compare, pace
from fedloom.studies.pace import Pace, count_evaluations
from small_testbed import small_testbed

DEMO = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds" / "demo.toml"
SMALL = ["federation.participants=['lab']", "training.max_steps=1", "federation.eval_every=0"]


@pytest.mark.parametrize(("rounds", "every", "times"), [(20, 2, 11), (20, 3, 8), (20, 0, 2), (1, 1, 2), (5, 10, 2)])
def test_evaluations_are_counted_as_the_engine_makes_them(rounds: int, every: int, times: int):
    config = load_config(DEMO, [f"federation.num_rounds={rounds}", f"federation.eval_every={every}"])
    assert count_evaluations(config) == times
    assert sum(r == rounds or bool(every and r % every == 0) for r in range(1, rounds + 1)) + 1 == times


def test_a_trial_leaves_nothing_behind_and_tells_every_part(tmp_path: Path, monkeypatch):
    (tmp_path / "bed").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    told = pace.measure_pace(load_config(small_testbed(tmp_path / "bed") / "demo.toml", [*SMALL, "method.name=fedit"]))
    assert told.around_s > 0 and told.evaluation_s > 0 and told.round_s > 0
    assert not list((tmp_path / "temporary").iterdir())


def test_what_is_stated_counts_the_runs_that_are_left(tmp_path: Path, monkeypatch):
    config = load_config(DEMO, ["federation.num_rounds=10", "federation.eval_every=5"])
    made = compare.plan_runs(config, ["fedit", "ffa"], [0, 1], tmp_path)
    made[0].folder.mkdir(parents=True)
    (made[0].folder / compare.FINISHED).touch()

    class Pool:
        def __init__(self, jobs: int) -> None: ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...
        def map(self, call, runs):
            return [Pace(1.0, 2.0, 3.0 if run.label == "ffa" else 4.0) for run in runs]

    monkeypatch.setattr(compare, "_pool", Pool)
    slow, fast = 1 + 3 * 2 + 10 * 4, 1 + 3 * 2 + 10 * 3
    assert compare.expected_seconds(made, 1) == slow + 2 * fast
    assert compare.expected_seconds(made, 3) == slow
