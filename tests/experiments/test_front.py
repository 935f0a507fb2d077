"""The front: entries become runs, runs become points, and what lies above loom is said."""

import csv
import math
import tomllib
from dataclasses import replace

import pytest
from experiments.figures import read_csv, rows, write_csv, write_work
from experiments.points import PUBLISHED, Point, above, best_at_each_budget, line_seconds
from experiments.work import Work, count_passes
from PIL import Image
from typer.testing import CliRunner

from experiments import __main__ as command
from experiments import front, picture
from fedloom import testbeds
from fedloom.errors import ConfigError
from fedloom.methods.table import build
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Aggregation, Evaluation, Ledger, ModuleGroup, RunRow, Training, Transfer
from fedloom.studies import compare

LISTS = """
[demo]
published = ["fedit", "fedsrd:paper"]
"10%" = ["loom:wire.budget=10%", "fedit:lora.r=4,lora.lora_alpha=8"]
"1%" = ["loom", "fedsrd"]
"""
SCORES = {"fedit": 0.9, "fedsrd:paper": 0.6, "loom:wire.budget=10%": 0.85, "fedit:lora.r=4,lora.lora_alpha=8": 0.95}
SCORES |= {"loom": 0.9, "fedsrd": 0.7}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Finished runs of `LISTS`, two seeds each: 2 rounds of one client that sends 40 bytes a value and a turn."""
    for name in ("demo.toml", "model", "data"):
        (tmp_path / name).symlink_to(testbeds.testbed_folder() / name)
    (tmp_path / "front.toml").write_text(LISTS)
    monkeypatch.setattr(front, "LISTS", tmp_path / "front.toml")
    found = front.entries([tmp_path], ["demo"], range(2), tmp_path / "runs", [])
    for run in front.distinct(found):
        run.folder.mkdir(parents=True)
        (run.folder / compare.FINISHED).touch()
        modules = (ModuleGroup(125, 2 if "lora.r=4" in run.label else 8),)
        with Ledger(run.folder / "ledger.jsonl") as ledger:
            ledger.append(RunRow(run.config.method.name, "m", ("ada",), 2, 1000, run.seed, {}, modules))
            for round in (1, 2):
                ledger.append(Training(round, "ada", 1.0, 10, 100, 0.5))
                ledger.append(Transfer(round, "ada", "up", "update", 80 if "loom" in run.label else 320))
                ledger.append(Aggregation(round, version=round))
                ledger.append(Transfer(round, "ada", "down", "change", 0, version=round - 1, delivery=round == 2))
                ledger.append(Evaluation(round, "bank", SCORES[run.label] - 0.2 * (2 - round) + 0.01 * run.seed, 1.0))
    return found


def test_entries_set_what_they_say(made):
    runs = {run.label: run.config for run in front.distinct(made)}
    assert len(front.distinct(made)) == 2 * len(runs) == 12
    small = runs["fedit:lora.r=4,lora.lora_alpha=8"]
    assert (small.method.name, small.lora.r, small.lora.lora_alpha) == ("fedit", 4, 8)
    assert runs["fedit"].lora.r == 16
    assert runs["loom:wire.budget=10%"].wire.budget == "10%"


def test_points_are_shares_of_the_reference_whatever_the_variants_rank(made):
    points = {point.variant: point for point in front.points(made)}
    assert points["loom"].share == pytest.approx(80 / 8000)
    assert points["fedit:lora.r=4,lora.lora_alpha=8"].share == pytest.approx(320 / 8000)
    assert points["loom"].within and points["fedit:lora.r=4,lora.lora_alpha=8"].within and not points["fedsrd"].within
    assert points["fedit"].score == pytest.approx(90.5)
    assert points["fedit"].half == pytest.approx(12.706 * 0.5)
    assert (points["fedit"].rounds, points["loom:wire.budget=10%"].halfway) == (2, pytest.approx(65.5))
    assert math.isnan(points["fedsrd:paper"].rounds)
    line = 2 * 0.08 + 8e-6 * 320 / 10
    assert points["fedit"].seconds[1] == pytest.approx(2 * (0.5 + line))


def test_the_line_takes_bytes_over_rates_and_a_round_trip_each_way():
    assert line_seconds(1e6, 5e6, (1.0, 5.0)) == pytest.approx(16 + 0.16)


def test_only_what_is_within_the_budget_and_beyond_both_intervals_lies_above():
    def point(variant, score, half, share=0.01, budget="1%"):
        return Point("demo", budget, variant, 5, share, 1, 1, 0, score, half, 1, (1, 1, 1), 1, "rank 16")

    ours = point("loom", 90, 1)
    assert above([ours, point("fedit:a=1", 94, 2)]) == [point("fedit:a=1", 94, 2)]
    assert not above([ours, point("fedit", 93, 2)])
    assert not above([ours, point("fedit", 99, 0, share=0.0101)])
    assert not above([ours, point("fedit", 99, 0, budget="published")])


def test_the_rows_and_the_picture_have_every_point(made, tmp_path):
    points = front.points(made)
    said = rows(points)
    assert [row["run"] for row in said] == [
        variant for some in tomllib.loads(LISTS)["demo"].values() for variant in some
    ]
    fedsrd = next(row for row in said if row["run"] == "fedsrd")
    assert (fedsrd["of dense fp32, rank 8"], fedsrd["rounds to 80 %"]) == ("4.00 % (over)", "–")
    picture.front(points, tmp_path / "front.png")
    with Image.open(tmp_path / "front.png") as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 100


def test_the_command_leaves_table_csv_and_picture(monkeypatch, tmp_path, made):
    monkeypatch.setattr(command, "testbed_folder", lambda: tmp_path)
    options = [
        "--testbeds",
        "demo",
        "--seeds",
        "2",
        "--first-seed",
        "0",
        "--out",
        str(tmp_path / "runs"),
        "--keep",
        str(tmp_path / "none.csv"),
    ]
    result = CliRunner().invoke(command.app, ["front", *options])
    assert result.exit_code == 0
    assert "12 runs, all of them complete: nothing is played" in result.stdout
    with (tmp_path / "runs" / "front.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 6
    # Ten steps of sixteen examples in each of twenty rounds; the made-up ledgers have a second of training.
    assert {(row["forward_passes"], row["backward_passes"], row["client_seconds"]) for row in found} == {
        ("3200", "3200", "1")
    }
    assert "| 3200 | 3200 | 1 |" in (tmp_path / "runs" / "work.md").read_text()
    assert (tmp_path / "runs" / "front-work.png").stat().st_size > 10_000
    assert (tmp_path / "runs" / "front.md").read_text().count("loom") == 2
    assert (tmp_path / "runs" / "grid.md").read_text().startswith("**demo**")
    assert (tmp_path / "runs" / "front.png").stat().st_size > 10_000


def test_an_unknown_testbed_is_named(made, tmp_path):
    with pytest.raises(ConfigError, match="no testbed 'moon': expected one of demo"):
        front.entries([tmp_path], ["moon"], range(1), tmp_path / "x", [])


def test_every_shipped_entry_is_a_valid_setting(tmp_path):
    names = ["demo", "many", "wordnet", "docstrings"]
    found = front.entries([testbeds.testbed_folder(), command.TESTBEDS], names, range(300, 301), tmp_path, [])
    budgets = {(entry.testbed, entry.budget) for entry in found}
    assert {(name, "1%") for name in names} <= budgets
    for name in names:
        mine = [entry for entry in found if entry.testbed == name]
        assert (mine[0].budget, mine[0].made[0].config.method.name) == ("published", "fedit")
        dense = next(entry for entry in mine if entry.budget == front.DENSE).made[0].config
        assert (dense.method.name, dense.wire.values, dense.lora.r) == ("fedit", "fp32", 16)
        free = name in ("wordnet", "docstrings")
        assert dense.federation.eval_every == (0 if free else 4)
        assert {entry.metric for entry in mine} == {"share_of_gain" if free else "exact_match"}
    for entry in found:
        build(entry.made[0].config.method.name, entry.made[0].config.method.settings)


def test_what_is_played_alone_comes_with_the_references(made):
    assert [entry.key[1:] for entry in front.selected(made, ["1%"])] == [
        ("published", "fedit"),
        ("1%", "loom"),
        ("1%", "fedsrd"),
    ]
    assert front.selected(made, []) == made
    with pytest.raises(ConfigError, match="no entry has the method or the budget 'lom'"):
        front.selected(made, ["lom"])


def test_where_a_gain_is_the_score_the_run_whose_gain_it_is_is_the_reference(tmp_path):
    found = front.entries([command.TESTBEDS], ["wordnet"], range(300, 302), tmp_path, [])
    played = [entry.key[1:] for entry in front.selected(found, ["0.1%"])]
    assert [budget for budget, _ in played] == [front.DENSE, "0.1%"]
    assert played[0][1].startswith("fedit:wire.values=fp32")


def test_nothing_stands_for_a_reference_that_is_missing(made):
    assert front.points(made)
    for run in made[0].made:
        (run.folder / compare.FINISHED).unlink()
    assert front.points(made) == []


def test_the_line_goes_through_a_methods_best_at_each_budget():
    def point(variant: str, score: float, budget: str = "1%") -> Point:
        return Point("demo", budget, variant, 5, 0.01, 1, 1, 0, score, 1.0, 1, (1, 1, 1), 1, "rank 16")

    points = [point("loom:a=1", 96.0), point("loom:a=2", 94.0), point("fedit", 50.0), point("loom:a=2", 80.0, "0.3%")]
    papers = [point("loom", 10.0, PUBLISHED), point("loom:a=3", 5.0, PUBLISHED)]
    kept = best_at_each_budget([*points, *papers])
    assert kept == [points[0], points[2], points[3], *papers]


@pytest.mark.parametrize(
    ("sets", "passes"),
    [
        ([], (3200, 3200)),
        (["training.gradient_accumulation_steps=3"], (9600, 9600)),
        (["federation.fraction_train=0.5"], (1600, 1600)),
        (["method.name=fedkseed"], (6400, 0)),
        (["method.name=decomfl", "method.perturbations=5", "training.max_steps=2"], (6400, 0)),
        (["training.num_train_epochs=1", "training.max_steps=null"], (math.nan, math.nan)),
        (["data.source=nowhere/{client}"], (math.nan, math.nan)),
    ],
)
def test_passes_follow_from_the_settings(sets, passes):
    config = load_config(testbeds.testbed_folder() / "demo.toml", sets)
    assert count_passes(config) == pytest.approx(passes, nan_ok=True)


def test_what_a_client_does_is_read_back_and_what_is_not_known_stays_empty(tmp_path):
    told = Work(3200, 0, 12.5, (40.0, 30.5, 20.0))
    points = [
        Point("demo", "1%", name, 5, 0.01, 1, 1, 0, 90, 1.0, 1, (1, 1, 1), 1, "rank 16", work=work)
        for name, work in (("loom", told), ("fedit", Work()))
    ]
    (tmp_path / "front.csv").write_text(write_csv(points))
    first, second = read_csv(tmp_path / "front.csv")
    assert first.work == told and first.work.passes == 3200
    assert math.isnan(second.work.passes) and second.work.walls == ()
    known, unknown = csv.DictReader((tmp_path / "front.csv").read_text().splitlines())
    assert (known["run_seconds_1_5"], unknown["run_seconds_1_5"], unknown["client_seconds"]) == ("40", "", "")
    assert "| – | – | – | – | – | – |" in write_work(points)


def test_the_passes_of_rows_without_runs_are_counted_from_their_settings(monkeypatch, tmp_path, made):
    monkeypatch.setattr(command, "testbed_folder", lambda: tmp_path)
    kept = front.points(made)
    (tmp_path / "old.csv").write_text(write_csv(kept))
    options = ["--figures", str(tmp_path / "old.csv"), "--out", str(tmp_path / "work")]
    result = CliRunner().invoke(command.app, ["work", *options])
    assert result.exit_code == 0, result.output
    found = read_csv(tmp_path / "work" / "front.csv")
    assert [(p.variant, p.work.forward) for p in found] == [(p.variant, 3200) for p in kept]
    old = replace(kept[0], rounds=16.0, seconds=(88.0, 22.0, 16.0), work=Work())
    (filled,) = front.with_passes([old], made)
    assert filled.work.walls == pytest.approx((110.0, 27.5, 20.0)) and math.isnan(filled.work.seconds)
    assert (tmp_path / "work" / "front-work.png").exists()
