"""A run that is judged on the validation split: when it ends, with which model, and the same after a crash anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from fedloom.errors import CheckpointError, ConfigError
from fedloom.lora.pair import digest
from fedloom.methods.method import State
from fedloom.model.evaluate import Scores
from fedloom.records.config import FederationSettings
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Choice, Evaluation, Note, Validation, read_rows, totals
from fedloom.records.lock import Writer
from fedloom.report.numbers import summarise
from fedloom.report.standing import judge_standing
from fedloom.server.stopping import Course
from fedloom.studies.tune import hide_heldout
from fedloom.workspace import export
from fedloom.workspace.folder import RunFolder
from toy import initial
from toy_run import ToySetup, simulation, toy_setup

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
LOSSES = (5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 2.0, 1.0)
"""After round 0, 1, …: the best of the first six is round 2's."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and pictures are tested elsewhere, and take longer than these runs."""
    monkeypatch.setattr(export, "write_report", lambda folder, rows: summarise(rows))


@dataclass(frozen=True)
class Judged(ToySetup):
    """Scores by version instead of a model: LOSSES on the validation split, ten times that on the held-out one."""

    def validate(self, state: State) -> dict[str, Scores]:
        loss = LOSSES[state.version]
        return {"bank": Scores(0.0, loss - 0.5, 1), "lab": Scores(0.0, loss + 0.5, 1)}

    def evaluate(self, state: State) -> dict[str, Scores]:
        return {"bank": Scores(0.0, 10 * LOSSES[state.version], 1)}


def judged(*overrides: str, method: str = "fedsrd") -> Judged:
    config = load_config(TESTBED / "demo.toml", ["federation.num_rounds=7", "federation.eval_every=1", *overrides])
    setup = toy_setup(
        config.model_copy(update={"method": config.method.model_copy(update={"name": method})}), 3, initial()
    )
    return Judged(**vars(setup))


PATIENT = ["federation.early_stopping_patience=3"]
BEST = [*PATIENT, "federation.load_best_model_at_end=true"]


def ended(folder: Path) -> tuple[object, ...]:
    """What must not depend on interruptions."""
    rows = read_rows(folder / "ledger.jsonl")
    said = [row for row in rows if isinstance(row, Note | Validation | Evaluation | Choice)]
    files = {path.relative_to(folder): path.read_bytes() for path in folder.glob("adapter*/**/*") if path.is_file()}
    return files, totals(rows), said


def test_a_run_stops_once_the_validation_loss_stands_still(tmp_path: Path):
    with simulation(judged(*PATIENT), tmp_path / "run") as run:
        summary = run.play(resume=False)
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    assert [row.round for row in rows if isinstance(row, Validation) and row.domain == "lab"] == [0, 1, 2, 3, 4, 5]
    assert [row for row in rows if isinstance(row, Choice)] == [Choice(5, 5)]
    assert run.server.version == 5 and summarise(rows).run.num_rounds == 5
    assert judge_standing(rows, Writer(alive=False), 0.0).state == "finished"
    said = [row.text for row in rows if isinstance(row, Note)]
    assert any("no better for 3 evaluations: best validation loss of 3 after round 2" in text for text in said)
    assert {state.digest for state in run.sites.states.values()} == {run.server.digest}
    assert summary.num_rounds == 5


def test_a_run_that_ended_by_its_validation_split_takes_no_more_rounds(tmp_path: Path):
    """Its model may be an earlier round's, and patience is over: further rounds would go on with neither."""
    with simulation(judged(*PATIENT), tmp_path / "run") as run:
        run.play(resume=False)
    told = r"ended after round 5 by its validation split and takes no more rounds.*model\.adapter"
    with pytest.raises(CheckpointError, match=told):
        simulation(judged(*PATIENT, "federation.num_rounds=9"), tmp_path / "run", resume=True).__enter__()
    with simulation(judged(*PATIENT), tmp_path / "run", resume=True) as run:
        assert run.play(resume=True).num_rounds == 5


@pytest.mark.parametrize("method", ["fedsrd", "florist"])
def test_the_best_rounds_model_is_delivered_and_exported(tmp_path: Path, method: str):
    """The twin ends after round 2, so that its last model is the best one."""
    with simulation(judged(*BEST, method=method), tmp_path / "best") as run:
        run.play(resume=False)
    with simulation(judged("federation.num_rounds=2", method=method), tmp_path / "two") as two:
        two.play(resume=False)
    weights = [(tmp_path / out / "adapter/adapter_model.safetensors").read_bytes() for out in ("best", "two")]
    assert weights[0] == weights[1]
    for state in run.sites.states.values():
        assert (state.version, state.digest) == (run.server.version, run.server.digest) == (6, run.server.digest)
        assert [digest(state.adapter), digest(state.frozen)] == [digest(two.server.adapter), digest(two.server.frozen)]
    rows = read_rows(tmp_path / "best" / "ledger.jsonl")
    assert [row for row in rows if isinstance(row, Choice)] == [Choice(5, 2)]
    last = summarise(rows).points[-1]
    assert (last.round, last.losses["bank"]) == (5, 30.0), "the scores at the end are those of the exported model"


class Crash(Exception):
    """Stands for a power cut."""


SLOW = [pytest.param(("save", call), marks=pytest.mark.slow) for call in (2, 6)]


@pytest.mark.parametrize("moment", [("save", 4), ("transfer", 29), *SLOW])
def test_a_crash_anywhere_changes_nothing(tmp_path: Path, moment: tuple[str, int], monkeypatch: pytest.MonkeyPatch):
    saved = [*BEST, "output.save_every=1", "output.save_total_limit=2"]
    with simulation(judged(*saved), tmp_path / "whole") as run:
        run.play(resume=False)
    kept = [path.name for path in sorted((tmp_path / "whole" / "adapters").iterdir())]
    assert kept == ["round-00004", "round-00005"]
    original, count = getattr(RunFolder, moment[0]), iter(range(1, 1000))

    def crash(folder: RunFolder, *arguments: object, **named: object) -> None:
        if next(count) == moment[1]:
            raise Crash
        original(folder, *arguments, **named)

    monkeypatch.setattr(RunFolder, moment[0], crash)
    with pytest.raises(Crash), simulation(judged(*saved), tmp_path / "broken") as run:
        run.play(resume=False)
    monkeypatch.undo()
    with simulation(judged(*saved), tmp_path / "broken", resume=True) as run:
        run.play(resume=True)
    assert ended(tmp_path / "broken") == ended(tmp_path / "whole")
    with simulation(judged(*saved), tmp_path / "broken", resume=True) as run:
        run.play(resume=True)  # a run that has stopped stays so
    assert ended(tmp_path / "broken") == ended(tmp_path / "whole")


def test_adapters_are_saved_on_the_way_and_are_those_of_shorter_runs(tmp_path: Path):
    with simulation(judged("output.save_every=3"), tmp_path / "run") as run:
        run.play(resume=False)
    assert sorted(path.name for path in (tmp_path / "run/adapters").iterdir()) == ["round-00003", "round-00006"]
    with simulation(judged("federation.num_rounds=3"), tmp_path / "three") as run:
        run.play(resume=False)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        saved = tmp_path / "run" / "adapters" / "round-00003" / file
        assert saved.read_bytes() == (tmp_path / "three" / "adapter" / file).read_bytes()


def test_who_does_not_ask_for_it_scores_no_validation_split(tmp_path: Path):
    with simulation(judged(), tmp_path / "run") as run:
        run.play(resume=False)
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    assert not any(isinstance(row, Validation | Choice) for row in rows) and run.round == 7


@pytest.mark.parametrize("change", ["data.validation=null", "federation.eval_every=0"])
@pytest.mark.parametrize("asked", ["federation.early_stopping_patience=3", "federation.load_best_model_at_end=true"])
def test_what_is_needed_is_said_at_once(change: str, asked: str):
    with pytest.raises(ConfigError, match=rf"{change.partition('=')[0]} is .*{asked.partition('=')[0]} needs"):
        load_config(TESTBED / "demo.toml", [asked, change])


def test_a_search_stops_as_its_runs_would():
    config = hide_heldout(load_config(TESTBED / "demo.toml", PATIENT))
    assert (config.data.heldout, config.data.validation) == ("validation", "validation")
    assert hide_heldout(load_config(TESTBED / "demo.toml")).data.validation is None


@given(
    st.lists(st.floats(0, 4).map(lambda x: round(x, 1)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_patience_is_counted_as_transformers_counts_it(losses: list[float], patience: int, threshold: float):
    course = Course(FederationSettings(early_stopping_patience=patience, early_stopping_threshold=threshold))
    twin, arguments = EarlyStoppingCallback(patience, threshold), TrainingArguments(metric_for_best_model="loss")
    arguments.greater_is_better, state, control = False, TrainerState(), TrainerControl()
    for place, loss in enumerate(losses):
        course.take([Validation(place, "bank", 0.0, loss)])
        twin.on_evaluate(arguments, state, control, {"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:  # what the Trainer does after its callbacks
            state.best_metric = loss
        assert course.is_over == control.should_training_stop, (place, losses)
        assert course.best == losses.index(min(losses[: place + 1]))
        if course.is_over:
            break


def test_a_loss_that_is_no_number_is_never_the_best():
    course = Course(FederationSettings(early_stopping_patience=1))
    course.take([Validation(0, "bank", 0.0, math.nan), Validation(0, "lab", 0.0, 1.0), Validation(1, "lab", 0.0, 9.0)])
    assert course.best == 1 and not course.is_over
