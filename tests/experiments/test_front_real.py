"""The front on real text: shares of a gain and their intervals, rows that stay, lines, rates, widths."""

import csv
import io
import math
import statistics
from dataclasses import replace

import pytest
import torch
from experiments.figures import grid, merge, pages, read_csv, write_csv, write_grids
from experiments.gain import gain, losses, paired, share_kept
from experiments.points import SHARE_OF_GAIN, Point, Reference, measured
from experiments.sending import Sending, coded_bytes, read_sending, write_sending
from PIL import Image

import tiny_models
from experiments import __main__ as command
from experiments import front, picture, tuning, width
from fedloom import testbeds
from fedloom.errors import ConfigError
from fedloom.methods.table import METHODS
from fedloom.model.examples import Example
from fedloom.records.ledger import Aggregation, Evaluation, Ledger, ModuleGroup, RunRow, Training, Transfer
from fedloom.report.figure import line_style
from fedloom.report.numbers import summarise
from fedloom.studies import compare

LISTS = """
[demo]
metric = "share_of_gain"
published = ["fedit:wire.values=fp32", "fedsrd:paper"]
"110%" = ["fedit:wire.values=fp32,training.learning_rate=8e-3"]
"1%" = ["loom"]
"""
BASE = 5.0


def ledger_rows(seed, end, bytes=320):
    """A run of two rounds of one client that takes the loss from `BASE` to `end`; exact match is 0."""
    rows = [RunRow("fedit", "m", ("ada",), 2, 1000, seed, {}, (ModuleGroup(125, 8),)), Evaluation(0, "g", 0.0, BASE)]
    for round in (1, 2):
        rows += [Training(round, "ada", 1.0, 10, 100, 0.5), Transfer(round, "ada", "up", "update", bytes)]
        rows += [Aggregation(round, version=round)]
        rows += [Transfer(round, "ada", "down", "change", 0, version=round - 1, delivery=round == 2)]
    return [*rows, Evaluation(2, "g", 0.0, end)]


def reports(ends):
    """Seed → the loss at the end, as runs."""
    return [summarise(ledger_rows(seed, end)) for seed, end in ends.items()]


DENSE = {300: 4.0, 301: 3.8, 302: 4.3}


def test_the_share_is_one_of_means_on_equal_seeds_with_the_interval_of_a_ratio():
    own, dense = reports({302: 4.4, 300: 4.2, 7: 1.0}), reports(DENSE)
    share, half = share_kept(paired(own, dense))
    pairs = [(BASE - 4.4, BASE - 4.3), (BASE - 4.2, BASE - 4.0)]
    mean = statistics.fmean(d for _, d in pairs)
    wanted = statistics.fmean(o for o, _ in pairs) / mean
    over = [o - wanted * d for o, d in pairs]
    assert share == pytest.approx(100 * wanted)
    assert half == pytest.approx(100 * 12.706 * statistics.stdev(over) / math.sqrt(2) / mean)
    assert share_kept(paired(dense, dense)) == (pytest.approx(100), pytest.approx(0, abs=1e-9))


def test_a_seed_that_shifts_all_methods_alike_is_not_in_the_interval():
    own = reports({seed: BASE - 0.9 * (BASE - end) for seed, end in DENSE.items()})
    assert share_kept(paired(own, reports(DENSE))) == (pytest.approx(90), pytest.approx(0, abs=1e-9))


def test_a_run_that_ends_above_its_base_has_a_negative_share():
    worse = reports(dict.fromkeys(DENSE, 5.5))
    pairs = paired(worse, reports(DENSE))
    assert gain(worse[0]) == pytest.approx(-0.5)
    assert share_kept(pairs)[0] == pytest.approx(-100 * 0.5 / (BASE - statistics.fmean(DENSE.values())))
    told = losses(pairs)
    assert told.loss == 5.5 and told.against == pytest.approx(5.5 - statistics.fmean(DENSE.values()))
    assert math.isnan(told.bits) and told.against_half > 0 == told.half


def test_there_is_no_share_of_a_gain_that_is_none():
    assert math.isnan(share_kept(paired(reports(DENSE), reports(dict.fromkeys(DENSE, BASE))))[0])


@pytest.fixture
def points():
    """Of two variants, the second above its base."""
    dense = tuple(reports(DENSE))
    reference = Reference(1000.0, "rank 8", dense)
    made = [("110%", "fedit", DENSE), ("1%", "loom:wire.budget=1%", dict.fromkeys(DENSE, 5.5))]
    return [measured("wordnet", budget, name, reports(ends), reference) for budget, name, ends in made]


def test_a_share_is_not_cut_off_at_nothing_and_reads_back(points, tmp_path):
    text = write_csv(points)
    assert points[1].metric == SHARE_OF_GAIN and points[1].score < -40
    last = list(csv.DictReader(io.StringIO(text)))[-1]
    assert float(last["low"]) < float(last["score"]) < -40 and last["metric"] == SHARE_OF_GAIN
    (tmp_path / "front.csv").write_text(text, encoding="utf-8")
    assert write_csv(read_csv(tmp_path / "front.csv")) == text


def exact(testbed, budget, variant, score=50.0):
    return Point(testbed, budget, variant, 5, 0.01, 1, 1, 0, score, 1, 1, (1.0, 1.0, 1.0), 1, "rank 16")


def test_rows_of_other_testbeds_and_of_entries_not_played_stay(points, tmp_path):
    kept = [exact("demo", "1%", "loom"), *points, exact("many", "1%", "loom"), exact("wordnet", "7%", "gone")]
    new = [points[1]]
    listed = [("wordnet", "110%", "fedit"), ("wordnet", "1%", "loom:wire.budget=1%")]
    merged = merge(kept, new, listed)
    assert merged == [kept[0], points[0], points[1], kept[3]]
    (tmp_path / "front.csv").write_text(write_csv(merged), encoding="utf-8")
    assert [point.metric for point in read_csv(tmp_path / "front.csv")].count(SHARE_OF_GAIN) == 2
    assert [len(page) for page in pages(merged)] == [2, 2]


def test_a_grid_has_a_methods_best_under_each_budget_and_tells_what_was_not_played():
    points = [
        exact("many", "7%", "fedit:lora.r=2", 70.0),
        exact("many", "7%", "fedit:lora.r=1", 60.0),
        exact("many", "1%", "loom", 80.0),
        exact("many", "1%", "fedit", 30.0),
    ]
    assert grid(points) == [
        {"method": "loom", "7%": "", "1%": "80.0 ± 1.0 (1.00 %)"},
        {"method": "fedit", "7%": "70.0 ± 1.0 (1.00 %)", "1%": "30.0 ± 1.0 (1.00 %)"},
    ]
    both = write_grids([*points, exact("demo", "7%", "loom")])
    assert both.index("**many**") < both.index("| fedit |") < both.index("**demo**\n\n| method | 7% |")


def test_the_picture_marks_what_lies_below_and_what_the_data_weigh(points):
    def size(**options):
        held = io.BytesIO()
        picture.front(points, held, **options)
        with Image.open(held) as image:
            return image.convert("RGB").tobytes()

    plain = size()
    lines = size(sending={"wordnet": Sending(20.0, 10.0, 1, "x")})
    assert plain != lines


def test_a_panel_goes_down_to_its_lowest_point_but_not_without_end(points):
    shares = [replace(points[0], score=score) for score in (90.0, 42.0, -400.0)]
    assert [picture.foot_of(shares[:count]) for count in (1, 2, 3)] == [70.0, 40.0, 30.0]
    assert picture.foot_of([exact("demo", "1%", "loom")]) == 0.0


def test_a_panel_goes_up_to_whoever_is_above_dense_fedit(points):
    shares = [replace(points[0], score=score) for score in (100.0, math.nan, 103.2)]
    assert [picture.top_of(shares[:count]) for count in (1, 2, 3)] == [103.0, 103.0, 106.0]
    assert picture.top_of([exact("demo", "1%", "loom")]) == 101.0


def test_a_method_looks_the_same_in_every_picture_and_like_no_other():
    every = picture.assign_slots([exact("demo", "1%", method) for method in [*METHODS, "mine"]])
    few = picture.assign_slots([exact("demo", "1%", method) for method in ("flasc", "fedsrd", "loom")])
    assert list(few) == ["loom", "fedsrd", "flasc"] and few.items() <= every.items()
    assert len({line_style(slot) for slot in every.values()}) == len(METHODS) + 1


def test_the_data_coded_by_a_model_are_what_its_probabilities_say():
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer(chat=False)
    texts = [Example("a word", " it is", form="prompt"), Example("another", " or a longer answer", form="prompt")]
    nats = 0.0
    for text in texts:
        words = tokenizer(text.instruction + text.output, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*words, tokenizer.eos_token_id]])
        with torch.no_grad():
            likely = model(ids).logits.log_softmax(-1)[0]
        nats += math.log(model.config.vocab_size)  # nothing predicts the first
        nats -= sum(float(likely[place, token]) for place, token in enumerate(ids[0, 1:]))
    assert coded_bytes(model, tokenizer, texts, "raw") == pytest.approx(nats / math.log(2) / 8, rel=1e-5)


def test_what_data_weigh_is_read_as_it_was_written(tmp_path):
    assert read_sending(tmp_path / "none.json") == {}
    found = {"wordnet": Sending(2.0, 1.0, 45, "digest")}
    write_sending(found, tmp_path / "sending.json")
    assert read_sending(tmp_path / "sending.json") == found


@pytest.fixture
def bed(tmp_path, monkeypatch):
    for name in ("demo.toml", "model", "data"):
        (tmp_path / name).symlink_to(testbeds.testbed_folder() / name)
    (tmp_path / "front.toml").write_text(LISTS)
    monkeypatch.setattr(front, "LISTS", tmp_path / "front.toml")
    return front.read_bed("demo", [tmp_path])


def finish(runs, end):
    for run in runs:
        run.folder.mkdir(parents=True)
        (run.folder / compare.FINISHED).touch()
        with Ledger(run.folder / "ledger.jsonl") as ledger:
            for row in ledger_rows(run.seed, end(run)):
                ledger.append(row)


def test_only_seeds_with_a_dense_run_have_a_share(bed, tmp_path):
    made = front.entries([tmp_path], ["demo"], range(300, 303), tmp_path / "runs", [])
    assert bed.metric == SHARE_OF_GAIN
    loom = [run for run in front.distinct(made) if run.label == "loom"]
    finish([*made[0].made, *loom], lambda run: 4.1)
    assert front.points(made) == []
    dense = next(entry for entry in made if entry.budget == front.DENSE)
    finish(dense.made[:2], lambda run: 4.0)
    found = {point.variant: point for point in front.points(made)}
    assert found["loom"].seeds == 2 and found["loom"].score == pytest.approx(90)
    assert found[dense.variant].score == pytest.approx(100)


def test_rates_are_tried_on_validation_without_the_one_of_the_list(bed, tmp_path):
    variants = tuning.listed(bed, [])
    found = tuning.searches(bed.config, variants, ["1e-3", "2e-3"], range(100, 101), tmp_path / "runs")
    assert [search.variant for search in found] == ["fedit:wire.values=fp32", "fedsrd:paper", "loom"]
    assert {run.config.data.heldout for search in found for run in search.made} == {"validation"}
    assert [run.config.training.learning_rate for run in found[2].made] == [1e-3, 2e-3]
    finish(found[2].made, lambda run: 4.5 if run.config.training.learning_rate == 1e-3 else math.nan)
    scores = {"base": "5.000", "1e-3": "4.500", "2e-3": "–", "best": "1e-3"}
    # 640 bytes up and none down, of the 16,000 of 2,000 values four times
    assert tuning.rows(found)[2] == {"run": "loom", **scores, "of dense fp32 %": "4.00"}
    assert tuning.listed(bed, [], ["ffa:training.learning_rate=3e-3,lora.r=4", "loom"]) == ["ffa:lora.r=4", "loom"]
    with pytest.raises(ConfigError, match="names no entry"):
        tuning.listed(bed, ["moon"])
    with pytest.raises(ConfigError, match="give one"):
        tuning.listed(bed, ["loom"], ["ffa"])


def test_widths_are_compared_on_the_same_seeds(bed, tmp_path):
    path = testbeds.testbed_folder() / "model"
    bases = width.parse_bases(f"128={path}, 512={path}")
    made = width.plan(bed.config, bases, ["fedit", "loom"], [300], tmp_path / "runs")
    finish([run for base in made for run in base.made], lambda run: 4.0 if run.label == "fedit" else 4.2)
    found = width.rows(made, ["fedit", "loom"])
    assert [(row["width"], row["run"], row["of dense FedIT's gain %"]) for row in found] == [
        (base, *told) for base in ("128", "512") for told in (("fedit", "100.0"), ("loom", "80.0"))
    ]
    with pytest.raises(ConfigError, match="expected WIDTH=FOLDER"):
        width.parse_bases("128")


def test_the_folder_of_testbeds_has_the_settings():
    assert {path.stem for path in command.TESTBEDS.glob("*.toml")} == {"wordnet", "docstrings"}
