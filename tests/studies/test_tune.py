"""A setting is chosen on the validation split, and the held-out one is never opened meanwhile."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedloom.cli import main as cli
from fedloom.cli import studies as commands
from fedloom.errors import ConfigError
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Evaluation, Ledger, RunRow, Training, Transfer
from fedloom.report.numbers import summarise
from fedloom.server import local
from fedloom.studies import compare, tune
from small_testbed import small_testbed

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
SHORT = [
    "method.name=florist",
    "method.client_init=merge_reinit",
    "federation.num_rounds=1",
    "federation.eval_every=0",
    "federation.participants=['lab']",
    "training.max_steps=1",
]


def report(score: float, size: int):
    rows = [RunRow("m", "m", ("a",), 1, 10, 0), Transfer(1, "a", "up", "update", size), Evaluation(1, "d", score, 1.0)]
    return summarise(rows)


@pytest.mark.parametrize(
    ("baseline", "efficient"),
    [(0.5, "0.8"), (0.65, "0.9"), (0.7, "0.9"), (0.75, "0.99"), (0.9, "0.99"), (None, "0.99")],
)
def test_o_scores_best_and_e_is_the_cheapest_that_matches(baseline, efficient):
    groups = {"k=0.8": [report(0.6, 10)], "k=0.9": [report(0.6, 20), report(0.8, 20)], "k=0.99": [report(0.8, 30)]}
    if baseline is not None:
        groups |= {"ffa": [report(0.1, 5)], "fedit": [report(baseline, 5)]}
    choice = tune.choose(groups, "k", ["0.8", "0.9", "0.99"])
    assert (choice.best.value, choice.efficient.value, choice.matched) == ("0.99", efficient, baseline)


def test_of_equal_scores_the_cheaper_one_is_best():
    choice = tune.choose({"k=1": [report(0.6, 10)], "k=2": [report(0.6, 9)]}, "k", ["1", "2"])
    assert choice.best.value == choice.efficient.value == "2"


@pytest.mark.usefixtures("no_picture")
def test_a_search_never_opens_the_held_out_split(tmp_path: Path):
    """It works where there is none: the files are deleted. What it writes names the split all the same."""
    (tmp_path / "bed").mkdir()
    bed = small_testbed(tmp_path / "bed")
    for path in bed.glob("data/*/heldout*"):
        path.unlink()
    config = load_config(bed / "demo.toml", SHORT)
    made = tune.plan_search(config, "method.tau", ["0.8", "0.99"], [], [100], tmp_path / "out")
    assert [run.config.data.heldout for run in made] == ["validation"] * 2
    assert "heldout" not in {str(value) for run in made for value in run.config.data.model_dump().values()}
    for run in made:
        local.run_local(run.config, run.folder)
    groups = compare.read_reports(made)
    choice = tune.choose(groups, "method.tau", ["0.8", "0.99"])
    files = tune.write_choice(config, "method.tau", choice, tmp_path / "out")
    sizes = {label: reports[0].totals.bytes for label, reports in groups.items()}
    assert sizes["method.tau=0.8"] < sizes["method.tau=0.99"]
    for name, found in (("O", choice.best), ("E", choice.efficient)):
        chosen = load_config(files[name])
        assert (chosen.data.heldout, chosen.data.validation) == ("heldout", "validation")
        assert chosen.method.settings["tau"] == float(found.value)
        assert chosen.method.settings["client_init"] == "merge_reinit"
        assert chosen.federation.seed == config.federation.seed


@pytest.mark.parametrize(
    ("override", "message"), [("data.validation=null", "is missing"), ("data.validation=heldout", "would leak")]
)
def test_a_search_needs_a_split_of_its_own(override: str, message: str):
    config = load_config(TESTBED / "demo.toml", [*SHORT, override])
    with pytest.raises(ConfigError, match=message):
        tune.plan_search(config, "method.tau", ["0.8"], [], [100], Path("unused"))


def free(*losses: float, exact: tuple[float, ...] = (0.0,), size: int = 10, examples: int = 0):
    """A run with this held-out loss round by round, and this exact match (the last one holds on)."""
    rows = [RunRow("m", "m", ("a",), len(losses) - 1, 10, 0), Transfer(1, "a", "up", "update", size)]
    matches = [*exact, *[exact[-1]] * len(losses)]
    pairs = enumerate(zip(losses, matches, strict=False))
    return summarise([*rows, *(Evaluation(at, "d", match, loss, examples=examples) for at, (loss, match) in pairs)])


def test_where_exact_match_is_0_for_all_the_loss_decides_and_it_is_said():
    """As on free text: 1e-5 learns nothing and costs less, 1e-2 learns, 1 is worse than the start, 9 has diverged."""
    groups = {
        "k=1e-5": [free(6.4, 6.36, size=5)],
        "k=1e-2": [free(6.4, 4.74)],
        "k=1": [free(6.4, 8.0, size=1)],
        "k=9": [free(6.4, float("nan"), size=1)],
        "k=1e30": [free(6.4, 6.4, size=0)],
        "fedit": [free(6.4, 5.0, size=90)],
    }
    for values in ("1e-5 1e-2 1 9 1e30", "1e30 9 1 1e-2 1e-5"):
        choice = tune.choose(groups, "k", values.split())
        assert (choice.best.value, choice.efficient.value) == ("1e-2", "1e-2")
        assert (choice.measure.key, choice.matched) == ("loss", 5.0)
        said = " ".join(choice.notes)
        assert "Exact match is 0 for all: the held-out loss decides." in said
        assert "k = 1 is not chosen: it ended worse than it began, 6.400 → 8.000 nats a token." in said
        assert "k = 1e30 is not chosen: it learnt nothing, its loss is still 6.400 nats a token." in said
        assert "k = 9 is not chosen: its loss is no finite number at the end." in said


def test_e_is_the_cheapest_of_those_whose_loss_matches():
    groups = {
        "k=1": [free(6, 4.9, size=5)],
        "k=2": [free(6, 4.0, size=9)],
        "fedit": [free(6, 5.0)],
        "ffa": [free(6, 5.5)],
    }
    choice = tune.choose(groups, "k", ["1", "2"])
    assert (choice.best.value, choice.efficient.value, choice.matched) == ("2", "1", 5.0)


@pytest.mark.parametrize(("examples", "best", "measure"), [(20, "2", "loss"), (20_000, "1", "exact_match")])
def test_exact_match_within_chance_is_a_tie(examples, best, measure):
    one, two = free(6, 5, exact=(0, 0.55), examples=examples), free(6, 4, exact=(0, 0.5), examples=examples)
    choice = tune.choose({"k=1": [one], "k=2": [two]}, "k", ["1", "2"])
    assert (choice.best.value, choice.measure.key) == (best, measure)
    assert any("a tie, so the held-out loss decides" in note for note in choice.notes) == (measure == "loss")


def test_a_run_whose_loss_rose_while_exact_match_rose_may_be_chosen():
    groups = {"k=1": [free(6, 7, exact=(0, 0.9))], "k=2": [free(6, 5, exact=(0, 0.1))]}
    assert tune.choose(groups, "k", ["1", "2"]).best.value == "1"
    assert tune.choose(groups, "k", ["1", "2"], by="loss").best.value == "2"


def test_where_no_value_is_fit_none_is_chosen():
    groups = {"k=1": [free(6, 7)], "k=2": [free(6, float("inf"))]}
    with pytest.raises(ConfigError, match=r"no value of k can be chosen\. k = 1 is not chosen: it ended worse.*k = 2"):
        tune.choose(groups, "k", ["1", "2"])


def test_values_that_score_the_same_are_named():
    choice = tune.choose({"k=1": [free(6, 5, size=9)], "k=2": [free(6, 5, size=8)]}, "k", ["1", "2"])
    assert choice.best.value == "2" and "k = 1 and 2 score the same: the fewest bytes decide." in choice.notes


def test_a_metric_that_is_not_measured_cannot_decide(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"evaluation\.metric is 'chrf', which is not measured: expected auto"):
        load_config(TESTBED / "demo.toml", ["evaluation.metric=chrf"])
    assert load_config(TESTBED / "demo.toml", ["evaluation.metric=chrf", "evaluation.metrics=['chrf']"])


def test_a_value_without_a_run_is_named():
    with pytest.raises(ConfigError, match=r"k=2 has no complete run"):
        tune.choose({"k=1": [report(0.5, 1)]}, "k", ["1", "2"])


def test_the_command_writes_both_settings(tmp_path: Path, monkeypatch):
    def play(made, jobs, finished):
        for run in made:
            run.folder.mkdir(parents=True)
            (run.folder / compare.FINISHED).touch()
            tau = run.config.method.settings.get("tau", 0.0)
            with Ledger(run.folder / "ledger.jsonl") as ledger:
                ledger.append(RunRow(run.config.method.name, "m", ("a",), 1, 10, run.seed))
                ledger.append(Training(1, "a", 1.0, 1, 1, 1.0))
                ledger.append(Transfer(1, "a", "up", "update", int(100 * tau)))
                ledger.append(Evaluation(1, "d", tau or 0.85, 1.0))
            finished(run, 1.0)

    monkeypatch.setattr(compare, "play_runs", play)
    monkeypatch.setattr(compare, "expected_seconds", lambda made, jobs, alike: 60.0)
    monkeypatch.setattr(commands, "screen", Console(file=io.StringIO(), width=200))
    command = ["tune", "--set", "method.name=florist", "--values", "0.8,0.9,0.99", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    assert {"O.toml", "E.toml", "tune.md"} <= {path.name for path in (tmp_path / "out").iterdir()}
    taus = [load_config(tmp_path / "out" / name).method.settings["tau"] for name in ("O.toml", "E.toml")]
    assert taus == [0.99, 0.9]
    shown = commands.screen.file.getvalue()
    assert "O: method.tau = 0.99, exact match 99.0 % on validation" in shown
    assert "Validation scores" in shown and "Held-out" not in shown
