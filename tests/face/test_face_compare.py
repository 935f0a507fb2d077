"""`fedloom.compare`: methods as names and as values, intervals over seeds, and what is refused."""

import pytest

import fedloom
from fedloom.errors import ConfigError
from fedloom.report.numbers import interval


@pytest.fixture(scope="module")
def compared(small, tmp_path_factory):
    config = fedloom.load(small / "demo.toml", {"lora.r": 2, "federation.eval_every": 0})
    mine = fedloom.replace(fedloom.build("fedit"), name="mine")
    out = tmp_path_factory.mktemp("compared")
    return fedloom.compare(config, ["fedsrd:paper", mine], num_rounds=1, seeds=2, first_seed=5, out=out)


def test_scores_are_one_a_seed_and_rows_have_their_interval(compared):
    assert set(compared.scores) == {"fedsrd:paper", "mine"}
    assert [report.run.seed for report in compared.reports["mine"]] == [5, 6]
    assert not any(sum(scores) for scores in compared.scores.values())  # after one step, so that the loss leads
    for row in compared.rows:
        mean, half = interval(compared.losses[row["run"]])
        assert row["loss"] == f"{mean:.3f} ± {half:.3f}" and row["seeds"] == "2"
    first, second = compared.losses.values()
    mean, half = interval([b - a for a, b in zip(first, second, strict=True)])
    told = [row["loss against the first"] for row in compared.rows]
    assert told == ["", f"{mean:+.3f} ± {half:.3f}"]


def test_a_comparison_shows_itself(compared):
    assert "| mine |" in repr(compared) and "<td>mine</td>" in compared._repr_html_()
    assert compared.plot().png.startswith(b"\x89PNG")


def test_a_comparison_without_scores_shows_itself(bed):
    both = fedloom.compare(bed, ["fedit", "ffa"], num_rounds=1, seeds=1)
    assert [row["seeds"] for row in both.rows] == ["1", "1"] and both.plot().png


def test_runs_that_are_complete_are_kept(compared, small, monkeypatch):
    config = fedloom.load(small / "demo.toml", {"lora.r": 2, "federation.eval_every": 0})
    monkeypatch.setattr("fedloom.server.local.run_local", None)  # nothing is played
    again = fedloom.compare(config, ["fedsrd:paper"], num_rounds=1, seeds=2, first_seed=5, out=compared.folder)
    assert again.scores["fedsrd:paper"] == compared.scores["fedsrd:paper"]


def test_complete_runs_of_other_settings_are_not_taken_for_these(compared, small, halves):
    config = fedloom.load(small / "demo.toml", {"lora.r": 2, "federation.eval_every": 0})
    other = fedloom.replace(halves(), name="mine")
    for methods, rounds in ((["fedsrd:paper"], 2), ([other], 1)):
        with pytest.raises(ConfigError, match="holds a complete run with other settings or another method"):
            fedloom.compare(config, methods, num_rounds=rounds, seeds=2, first_seed=5, out=compared.folder)


def test_each_run_is_told_as_it_ends(bed):
    told = []
    fedloom.compare(bed, ["fedit"], num_rounds=1, seeds=2, finished=lambda *run: told.append(run[:2]))
    assert told == [("fedit", 0), ("fedit", 1)]


def test_two_methods_of_one_name_are_refused(bed, halves):
    for methods in ([halves(keep=0.25), halves(keep=0.5)], ["fedit", "fedit"], ["fedit", fedloom.build("fedit")]):
        with pytest.raises(ConfigError, match=r"two of the methods are called '(halves|fedit)'.*fedloom\.replace"):
            fedloom.compare(bed, methods, seeds=1)


def test_a_method_value_cannot_go_to_another_process(bed, halves):
    with pytest.raises(ConfigError, match=r"'halves' is a value.*package\.module:builder.*jobs=1"):
        fedloom.compare(bed, ["fedit", halves()], jobs=2)


@pytest.mark.parametrize("arguments", [{"seeds": 0}, {"jobs": 0}])
def test_counts_below_one_are_refused(bed, arguments):
    with pytest.raises(ConfigError, match="expected at least 1 of each"):
        fedloom.compare(bed, ["fedit"], **arguments)


@pytest.mark.parametrize("methods", ["fedit", []])
def test_methods_are_a_list(bed, methods):
    with pytest.raises(ConfigError, match="expected to be a list of one method or more"):
        fedloom.compare(bed, methods)
