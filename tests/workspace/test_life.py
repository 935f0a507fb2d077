"""A run's life: how it ends and says so, how it begins again, is replaced, and goes on with more rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import serialize_file

from fedloom.errors import CheckpointError, ConfigError, RoundError
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import State
from fedloom.records.config import Config
from fedloom.records.configfile import load_config
from fedloom.records.events import RunSummary, Silent
from fedloom.records.ledger import Evaluation, Note, RunRow, Training, Transfer, read_rows
from fedloom.records.session import End, Session
from fedloom.report.metrics import prometheus_text
from fedloom.report.outcome import describe_decline, name_rounds
from fedloom.rounds.step import Train, Trained
from fedloom.server.local import run_local
from fedloom.workspace import pulse
from fedloom.workspace.assemble import load_setup
from fedloom.workspace.folder import RunFolder
from fedloom.workspace.plan import caps_of
from fedloom.workspace.resumption import find_differences
from small_testbed import small_testbed
from toy import initial
from toy_run import ToySetup, simulation, toy_setup

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
pytestmark = pytest.mark.usefixtures("no_picture")
TOY = ["federation.num_rounds=4", "federation.eval_every=0", "method.name=fedit"]


@dataclass(frozen=True)
class Diverging(ToySetup):
    """A toy whose training ends in infinities at some clients in some rounds."""

    bad: frozenset[tuple[str, int]] = frozenset()

    def train(self, client: str) -> Train:
        step = ToySetup.train(self, client)

        def train(state: State, round: int, seed: int) -> Trained:
            done = step(state, round, seed)
            if (client, round) not in self.bad:
                return done
            spoilt = {name: LoraPair(pair.A, pair.B * torch.inf) for name, pair in done.adapter.items()}
            return replace(done, adapter=LoraState(spoilt))

        return train


class Listener(Silent):
    """Keeps what is noted, as a person would see it."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.warned: tuple[str, ...] = ()

    def run_started(self, facts) -> None:
        self.warned = facts.warnings

    def noted(self, round: int, text: str) -> None:
        self.heard.append(text)


def toy_config(*overrides: str) -> Config:
    return load_config(TESTBED / "demo.toml", [*TOY, *overrides])


def play(
    out: Path, bad: dict[int, str] | None = None, *, resume: bool = False, force: bool = False, listener=None, sets=()
) -> RunSummary:
    """A toy run of two clients, "0" and "1". bad: round → clients whose training diverges, such as "01"."""
    setup = toy_setup(toy_config(*sets), 2, initial())
    job = replace(setup.job, caps=caps_of(setup.config.federation, setup.sites))
    names = list(setup.sites)
    spoilt = frozenset((names[int(which)], round) for round, some in (bad or {}).items() for which in some)
    diverging = Diverging(setup.config, job, setup.initial, setup.sites, bad=spoilt)
    with simulation(diverging, out, listener, resume=resume, force=force) as run:
        return run.play(resume=resume)


def rows_of(out: Path, kind: type):
    return [row for row in read_rows(out / "ledger.jsonl") if isinstance(row, kind)]


# How a run ends


def test_a_run_in_which_every_training_diverges_fails_and_leaves_no_adapter(tmp_path: Path):
    listener = Listener()
    summary = play(tmp_path / "run", dict.fromkeys(range(1, 5), "01"), listener=listener)
    with pytest.raises(RoundError, match=r"run failed: no update could be averaged.* lower training\.learning_rate"):
        summary.check()
    end = rows_of(tmp_path / "run", End)[-1]
    assert (end.status, end.round) == ("failed", 3), "what three rounds did, the fourth would do too"
    assert "lower training.learning_rate" in end.reason
    assert not (tmp_path / "run" / "adapter").exists()
    assert "This run failed: " in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert sum("not finite after training" in text for text in listener.heard) == 6


def test_a_round_in_which_every_training_diverges_is_a_note_where_others_went_on(tmp_path: Path):
    summary = play(tmp_path / "run", {2: "01", 3: "0"})
    assert not summary.failure and (tmp_path / "run" / "adapter").is_dir()
    assert len(summary.notes) == 1 and summary.notes[0].startswith("nothing was learnt in 1 of 4 rounds: 2 (client")
    assert rows_of(tmp_path / "run", End)[-1].status == "finished"


def test_a_failed_run_that_is_killed_and_resumed_fails_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bad = dict.fromkeys(range(1, 5), "01")
    save = RunFolder.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        saved: list[int] = []

        def stop(self, snapshot):
            save(self, snapshot)
            saved.append(snapshot.round)
            if snapshot.round == 2:
                raise KeyboardInterrupt

        patch.setattr(RunFolder, "save", stop)
        play(tmp_path / "run", bad)
    assert rows_of(tmp_path / "run", End)[-1].status == "interrupted"
    assert play(tmp_path / "run", bad, resume=True).failure
    assert [(end.status, end.round) for end in rows_of(tmp_path / "run", End)] == [("failed", 3)]


def test_a_round_whose_updates_are_all_refused_is_skipped(tmp_path: Path):
    listener = Listener()
    summary = play(tmp_path / "run", listener=listener, sets=["federation.max_norm=1e-9"])
    assert "refused" in summary.failure and rows_of(tmp_path / "run", End)[-1].status == "failed"
    assert sum("no update could be averaged: the round is skipped" in text for text in listener.heard) == 4


def test_what_ends_a_run_is_recorded_and_taken_back_where_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="is full: make room"):
        patch.setattr("fedloom.server.loop.finish_run", full)
        play(tmp_path / "run")
    (end,) = rows_of(tmp_path / "run", End)
    assert end.status == "failed" and "is full: make room, then go on with --resume" in end.reason
    play(tmp_path / "run", resume=True)
    assert [end.status for end in rows_of(tmp_path / "run", End)] == ["finished"]
    first, second = rows_of(tmp_path / "run", Session)
    assert (first.round, second.round, first.seconds) == (0, 4, 0.0) and second.seconds > 0


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            (0.1, 2.0),
            (0.1, 3.0),
            "held-out loss rose from 2.000 to 3.000; lower training.learning_rate",
        ),
        (
            (0.1, 2.0),
            (0.5, 2.5),
            "held-out loss rose from 2.000 to 2.500 although exact match rose",
        ),
        (
            (0.1, 2.0),
            (0.1, float("nan")),
            "held-out loss was 2.000 and is not finite",
        ),
        ((0.1, 2.0), (0.1, 2.0), ""),
        ((0.1, 2.0), (0.0, 1.0), ""),
    ],
)
def test_a_run_that_ends_worse_than_it_began_says_so(before, after, words):
    found = describe_decline([Evaluation(0, "x", *before), Evaluation(3, "x", *after)])
    assert found.startswith(words and f"the run ended worse than it began: {words}") and bool(found) == bool(words)
    assert describe_decline([Evaluation(0, "x", *before)]) == ""


def test_rounds_are_named_by_stretches():
    assert name_rounds([2]) == "2" and name_rounds([3, 4, 5, 9]) == "3 to 5, 9"
    assert name_rounds(list(range(1, 30, 2))) == "1, 3, 5, 7, …"


# How it begins again


def test_a_run_that_learnt_nothing_makes_way(tmp_path: Path):
    (tmp_path / "run").mkdir()
    play(tmp_path / "run", dict.fromkeys(range(1, 5), "01"))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"learning_rate was .* begin anew without --resume"):
        play(tmp_path / "run", resume=True, sets=["training.learning_rate=0.5"])
    summary = play(tmp_path / "run", sets=["training.learning_rate=0.5"])
    assert not summary.failure and [end.status for end in rows_of(tmp_path / "run", End)] == ["finished"]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_run_that_learnt_something_is_never_overwritten_unasked(tmp_path: Path):
    play(tmp_path / "run")
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"another run \(4 of 4 rounds, finished\): add --resume .* --force"):
        play(tmp_path / "run")
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before


def test_force_moves_a_run_aside_and_leaves_other_files(tmp_path: Path):
    play(tmp_path / "run")
    whole = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    for number, beside in enumerate(("run-old", "run-old-2")):
        listener = Listener()
        play(tmp_path / "run", force=True, listener=listener, sets=[f"federation.seed={number + 1}"])
        assert any(str(tmp_path / beside) in text for text in listener.warned)
        assert (tmp_path / beside / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run-old" / "ledger.jsonl").read_bytes() == whole
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert [row.seed for row in rows_of(tmp_path / "run", RunRow)] == [2]


@pytest.mark.parametrize(
    "files", [{"thesis.docx": "x"}, {"config.toml": "[server]\nport = 80\n"}, {"ledger.jsonl": "x\n"}]
)
def test_force_touches_nothing_that_is_no_run(tmp_path: Path, files: dict[str, str]):
    (tmp_path / "run").mkdir()
    for name, text in files.items():
        (tmp_path / "run" / name).write_text(text)
    with pytest.raises(CheckpointError, match="holds other files: choose another --out"):
        play(tmp_path / "run", force=True)
    assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == files


def test_a_run_in_progress_is_not_replaced(tmp_path: Path):
    config = toy_config()
    with RunFolder.open(tmp_path / "run", config) as folder:
        folder.ledger.append(RunRow("fedit", "m", ("a",), 4, 10, 0))
        for options in ({}, {"force": True}, {"resume": True}):
            with pytest.raises(CheckpointError, match="another process is working"):
                RunFolder.open(tmp_path / "run", config, **options)
    with pytest.raises(ConfigError, match="give one of the two"):
        RunFolder.open(tmp_path / "run", config, resume=True, force=True)


def test_a_set_up_that_fails_leaves_nothing(tmp_path: Path):
    for optim, words in (
        ("lion", r"'lion' is unknown.*did you mean 'lion_"),
        ("galore_adamw", "does not work here: .*galore"),
    ):
        config = load_config(TESTBED / "demo.toml", [f"training.optim={optim}", "federation.participants=['lab']"])
        with pytest.raises(ConfigError, match=words):
            run_local(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


# How it goes on


def test_a_resume_with_other_settings_names_the_keys(tmp_path: Path):
    play(tmp_path / "run")
    sets = ["training.learning_rate=0.5", "lora.r=3", "data.max_length=99", "federation.seed=7", "training.max_steps=9"]
    with pytest.raises(CheckpointError) as caught:
        play(tmp_path / "run", resume=True, sets=sets)
    text = str(caught.value)
    assert "differs from the settings given: lora.r was 16 and is 3; " in text
    assert "federation.seed was 0 and is 7" in text and "; and 1 more. Resume with" in text and "--force" in text


def test_settings_that_the_outcome_does_not_rest_on_may_change(tmp_path: Path):
    play(tmp_path / "run")
    free = ["output.max_rank=2", "output.keep_payloads=true", "federation.eval_every=1", "flower.retries=9"]
    assert play(tmp_path / "run", resume=True, sets=free).lost_energy >= 0.0


def test_a_run_that_ends_by_its_evaluations_is_held_to_how_often_they_come():
    judged = load_config(TESTBED / "demo.toml", ["federation.early_stopping_patience=2", "federation.eval_every=1"])
    other = load_config(TESTBED / "demo.toml", ["federation.early_stopping_patience=2", "federation.eval_every=2"])
    assert find_differences(judged, other) == {"federation.eval_every": (1, 2)}


def test_a_cap_on_the_exported_rank_says_what_it_loses(tmp_path: Path):
    summary = play(tmp_path / "run", sets=["output.max_rank=1"])
    assert 0 < summary.lost_energy < 1 and "output.max_rank = 1: the exported adapter lacks" in summary.notes[-1]
    assert rows_of(tmp_path / "run", End)[-1].lost_energy == pytest.approx(summary.lost_energy)
    assert "the exported adapter lacks" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_finished_run_takes_more_rounds_but_not_fewer(tmp_path: Path):
    listener = Listener()
    play(tmp_path / "run")
    play(tmp_path / "run", resume=True, listener=listener, sets=["federation.num_rounds=6"])
    assert listener.warned[0].startswith(
        "federation.num_rounds was 4 and is 6 from round 5 on; the learning rate goes on"
    )
    assert [row.num_rounds for row in rows_of(tmp_path / "run", RunRow)] == [4, 6]
    play(tmp_path / "whole", sets=["federation.num_rounds=6"])
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert adapters[0] == adapters[1], "the toy's training knows no learning rate"
    with pytest.raises(CheckpointError, match=r"num_rounds is 5, but 6 rounds"):
        play(tmp_path / "run", resume=True, sets=["federation.num_rounds=5"])
    with pytest.raises(CheckpointError, match=r"differs .*num_rounds was 6 and is 7"):  # sites elsewhere
        RunFolder.open(tmp_path / "run", toy_config("federation.num_rounds=7"), resume=True, extend=False)


def test_two_rounds_and_one_more_are_three_rounds_bit_for_bit(tmp_path: Path):
    (tmp_path / "bed").mkdir()
    bed = small_testbed(tmp_path / "bed")
    sets = ["training.lr_scheduler_type=constant", "federation.participants=['bank', 'lab']", "data.heldout=null"]

    def config(rounds: int) -> Config:
        return load_config(bed / "demo.toml", [*sets, f"federation.num_rounds={rounds}"])

    run_local(config(2), tmp_path / "run")
    listener = Listener()
    run_local(config(3), tmp_path / "run", resume=True, observer=listener)
    run_local(config(3), tmp_path / "whole")
    assert listener.warned[0] == "federation.num_rounds was 2 and is 3 from round 3 on"
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert adapters[0] == adapters[1]
    losses = [[row.loss for row in rows_of(tmp_path / name, Training)] for name in ("run", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    sent = [sum(row.bytes for row in rows_of(tmp_path / name, Transfer)) for name in ("run", "whole")]
    assert sent[0] == sent[1], "what was delivered after round 2 is not sent again in round 3"


# What is kept and noted


def test_payloads_of_clients_with_odd_names_are_all_kept(tmp_path: Path):
    from fedloom.cli.inspect import describe_path
    from fedloom.face.run import Run

    setup = toy_setup(toy_config("federation.num_rounds=2", "output.keep_payloads=true"), 1, initial())
    site = next(iter(setup.sites.values()))
    names = ("a b", "a/b", "é", "ü", "a:b", "a_b", 'a"b')
    odd = ToySetup(setup.config, setup.job, setup.initial, dict.fromkeys(names, site))
    with simulation(odd, tmp_path / "run") as run:
        run.play(resume=False)
    files = sorted((tmp_path / "run" / "payloads").iterdir())
    moved = rows_of(tmp_path / "run", Transfer)
    assert len(files) == len(moved) == 4 * len(names)
    assert not any(set('<>:"/\\|?*') & set(file.name) for file in files), "a file system of Windows takes them"
    assert [len(payload) for payload in Run.open(tmp_path / "run").payloads] == [row.bytes for row in moved]
    assert all(describe_path(file) for file in files)


def test_a_rank_above_what_a_module_can_have_is_noted():
    config = load_config(TESTBED / "demo.toml", ["lora.r=200", "federation.participants=['lab']", "data.heldout=null"])
    setup = load_setup(config)
    assert any("lora.r is 200 in model.layers" in text and "costs bytes only" in text for text in setup.warnings())


def test_notes_of_a_run_are_in_its_ledger_as_they_were_heard(tmp_path: Path):
    listener = Listener()
    play(tmp_path / "run", {2: "0"}, listener=listener)
    kept = rows_of(tmp_path / "run", Note)
    assert [row.text for row in kept] == listener.heard
    assert [row.round for row in kept if row.about == "diverged"] == [2]


def test_a_full_disk_leaves_room_to_say_how_the_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was written of a checkpoint is taken away again: otherwise not one row more would fit."""
    out = tmp_path / "run"

    def full(tensors, path, metadata):
        if "round-00002" in str(path):
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        serialize_file(tensors, path, metadata)

    monkeypatch.setattr("fedloom.workspace.checkpoint.serialize_file", full)
    with pytest.raises(CheckpointError, match="is full: make room, then go on with --resume"):
        play(out)
    end = read_rows(out / "ledger.jsonl")[-1]
    assert isinstance(end, End) and end.status == "failed" and "is full: make room" in end.reason
    assert not list((out / "checkpoints").glob("*.partial"))
    assert 'state="failed"} 1' in (out / "metrics.prom").read_text()
    monkeypatch.undo()
    play(out, resume=True)
    assert rows_of(out, End)[-1].status == "finished" and 'state="finished"} 1' in (out / "metrics.prom").read_text()


def test_what_ends_a_run_is_told_even_where_no_row_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(ledger) -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(RoundError, match="the true reason"), RunFolder.open(tmp_path / "run", toy_config()) as folder:
        folder.ledger.note(1, "something")
        monkeypatch.setattr("fedloom.records.ledger.Ledger.sync", full)
        raise RoundError("the true reason")


def test_the_metrics_give_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.01)
    times = iter(range(2_000_000_000, 2_000_001_000))
    monkeypatch.setattr(pulse.time, "time", lambda: float(next(times)))
    file = pulse.MetricsFile(tmp_path / "metrics.prom")
    run = RunRow(method="m", model="b", clients=("a",), num_rounds=2, adapter_values=9, seed=0)
    text = seen = prometheus_text([run], 'a "run"', 5.0)
    file.write(text)
    while seen == text:
        seen = (tmp_path / "metrics.prom").read_text()
    file.close()
    changed = [line for line in seen.splitlines() if line not in text.splitlines()]
    assert len(changed) == 1 and changed[0].startswith("fedloom_last_update_timestamp_seconds{")
    assert changed[0].split()[-1].startswith("200000") and not list(tmp_path.glob("*.partial"))
