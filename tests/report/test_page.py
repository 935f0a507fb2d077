"""The page of a run and of several side by side: its data, its HTML, its figures, the command that writes it."""

import base64
import csv
import hashlib
import io
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedloom.cli import main as cli
from fedloom.errors import CheckpointError
from fedloom.records.ledger import (
    Aggregation,
    Evaluation,
    Layers,
    Ledger,
    Note,
    Presence,
    Roll,
    RunRow,
    Training,
    Transfer,
    dump_row,
)
from fedloom.records.lock import take_lock
from fedloom.records.rows import ROWS
from fedloom.records.session import End, Session
from fedloom.report import summarise
from fedloom.report.page import RunSet, find_runs, list_figures, page_of, write_html, write_update
from fedloom.report.page.charts import Axis, Chart, Series
from fedloom.report.page.figures import Figure
from fedloom.report.page.layers import place_module
from fedloom.report.page.learning import find_front
from fedloom.report.page.run import PageRun, group_runs
from fedloom.report.page.sites import attend
from fedloom.report.page.stages import add_stages
from fedloom.report.page.values import MOST_ROWS, chart_csv, chart_table
from fedloom.report.prediction import ComparedRow, RunPrediction, write_prediction
from page_reading import Reading, page_text

CLIENTS = ("ada", "bob")
MODULES = tuple(f"model.layers.{layer}.self_attn.{kind}" for layer in range(2) for kind in ("q_proj", "v_proj"))
SETTINGS = '[method]\nname = "{}"\ntau = {}\n[federation]\nseed = {}\n[output]\ndir = "{}"\n'


def told(seed=0, method="florist", tau=0.9, rounds=3, clients=CLIENTS, worth=1.0):
    """The rows of a run that says all that a ledger can."""
    yield RunRow(method, "models/base", clients, rounds, 1000, seed)
    versions = {"fedloom": "0.1", "torch": "2.9+cpu"}
    yield Session(
        0, "2026-01-02T03:04:05+00:00", SETTINGS.format(method, tau, seed, seed), versions, {"cpus": "2 CPUs"}
    )
    yield Presence(1, clients)
    for round in range(rounds + 1):
        for place, client in enumerate(clients if round else ()):
            yield Transfer(round, client, "down", "change", 700, {"header": 20, "values": 680})
            stages = {"decode": 0.1, "compress": 0.2, "encode": 0.3}
            yield Training(round, client, 2.0 / round + place / 10, 10, 100, 1.0, stages)
            yield Transfer(round, client, "up", "update", 300, {"header": 20, "values": 280})
        if round:
            parts, norms = {"decode": 0.5, "encode": 0.25}, dict.fromkeys(clients, 2.0)
            yield Aggregation(round, {"mean_rank": 4.0}, 2.0, round, parts, norms, 0.5)
            yield Layers(round, MODULES, (4, 4, 2, 2), (0.5,) * 4, (1.0, 2.0, 3.0, 4.0), (0.9, 0.9, 0.8, math.nan))
        yield Evaluation(round, "bank", min(0.3 * round * worth + seed / 100, 1.0), 3.0 - round / 2, 0.5)


def written(folder, *rows):
    folder.mkdir(parents=True)
    with Ledger(folder / "ledger.jsonl") as ledger:
        for row in rows:
            ledger.append(row)
    return folder


def page_of_rows(rows, folder=Path("runs/x")):
    held = list(rows)
    return page_of(folder, summarise(held), held)


def chart(page, name):
    return next(chart for chart in page.charts if chart.id == name)


def page_run(rows, folder="x"):
    held = list(rows)
    return PageRun(Path(folder), summarise(held), held)


def test_a_page_has_a_figure_for_all_that_a_ledger_says():
    page = page_of_rows([*told(), End(3, "finished", "", 9.0)])
    assert {chart.id for chart in page.charts} == {
        *(
            f"{measure}-{along}"
            for measure in ("exact-match", "loss", "training-loss")
            for along in ("rounds", "bytes")
        ),
        *("bytes-rounds", "bytes-clients", "bytes-parts", "client-losses", "client-norms", "drift-agreement"),
        *("attendance", "layers-rank", "layers-density", "layers-norm", "layers-energy", "stages-rounds"),
    }
    assert [section.id for section in page.sections] == ["learning", "bytes", "clients", "layers", "time", "origin"]
    text = Reading(write_html(page)).text
    for words in (
        "fedloom run runs/x/config.toml",
        "fedloom==0.1",
        "mean_rank",
        "3 rounds, 2 clients, seed 0",
        "2 CPUs",
    ):
        assert words in text
    assert "torch==" not in text, "a build of a version is no package"


def test_an_older_ledger_reads_and_its_page_leaves_out_what_it_does_not_say():
    old = [
        b'{"row":"run","method":"fedit","model":"m","clients":["a"],"num_rounds":1,"adapter_values":10,"seed":0}',
        b'{"row":"training","round":1,"client":"a","loss":1.0,"steps":1,"examples":5,"seconds":0.5}',
        b'{"row":"transfer","round":1,"client":"a","direction":"up","kind":"update","bytes":9}',
        b'{"row":"aggregation","round":1,"stats":{},"seconds":0.5}',
    ]
    page = page_of_rows([ROWS.validate_json(line) for line in old])
    assert not {"client-norms", "drift-agreement", "layers-rank"} & {chart.id for chart in page.charts}
    assert "layers" not in [section.id for section in page.sections]


def test_rows_of_layers_come_back_as_they_were():
    row = next(row for row in told() if isinstance(row, Layers))
    read = ROWS.validate_json(dump_row(row))
    assert (read.modules, read.ranks, read.densities, read.norms) == (row.modules, row.ranks, row.densities, row.norms)
    assert read.kept[:3] == row.kept[:3] and math.isnan(read.kept[3])


def test_only_the_package_s_scripts_may_run():
    text = write_html(page_of_rows(told()))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    code = [script for kind, script in Reading(text).scripts if not kind]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in code]
    assert len(code) == 3 and re.findall(r"sha256-([^' ]+)", policy) == digests
    assert "connect-src 'none'" in policy and "connect-src 'self'" in write_html(page_of_rows(told()), live=True)


def test_a_live_page_is_told_the_same_main_part_and_charts():
    page = page_of_rows(told())
    update, text = json.loads(write_update(page)), write_html(page, live=True)
    assert update["main"] in text
    (data,) = (script for kind, script in Reading(text).scripts if kind)
    assert json.loads(data)["charts"] == update["charts"] and json.loads(data)["live"]


def test_every_chart_has_a_table_and_a_place_that_the_keyboard_reaches():
    page = page_of_rows(told())
    text = write_html(page)
    for one in page.charts:
        figure = text[text.index('<figure class="chart', text.index(f'id="{one.id}"') - 40) :]
        figure = figure[: figure.index("</figure>")]
        assert f'data-chart="{one.id}" tabindex="0" role="img"' in figure and "<table>" in figure, one.id


def test_runs_that_differ_in_their_seed_only_are_one_variant():
    runs = [page_run(told(seed)) for seed in range(3)]
    runs += [page_run(told(0, tau=0.5)), page_run(told(0, method="fedit"))]
    variants = group_runs(runs)
    assert [(variant.name, len(variant.runs)) for variant in variants] == [
        ("florist tau=0.9", 3),
        ("florist tau=0.5", 1),
        ("fedit", 1),
    ]


def test_variants_of_older_ledgers_are_told_apart_by_their_folders():
    rows = [RunRow("fedit", "m", CLIENTS, 1, 10, 0)]
    other = [RunRow("fedit", "m", CLIENTS, 2, 10, 0)]
    assert [v.name for v in group_runs([page_run(rows, "r/a"), page_run(other, "r/b")])] == ["fedit, a", "fedit, b"]


def test_several_runs_stand_side_by_side_with_intervals(tmp_path):
    for method, worth in (("florist", 1.0), ("fedit", 0.5)):
        for seed in range(2):
            rows = [*told(seed, method, worth=worth), End(3, "finished", "", 9.0)]
            written(tmp_path / method / f"seed-{seed}", *rows)
    found = find_runs([tmp_path])
    assert [folder.relative_to(tmp_path).as_posix() for folder in found] == [
        f"{method}/seed-{seed}" for method in ("fedit", "florist") for seed in (0, 1)
    ]
    page = RunSet(found).read()
    curve = chart(page, "exact-match-rounds")
    assert [series.name for series in curve.series] == ["fedit", "florist"]
    round, mean, low, high = curve.series[1].points[2]
    half = 12.706 * math.sqrt(0.5) / math.sqrt(2)  # of 60 and 61 %
    assert (round, mean, low, high) == pytest.approx((2, 60.5, 60.5 - half, 60.5 + half), rel=1e-4)
    front = chart(page, "front")
    assert [series.name for series in front.series] == ["fedit", "florist"], (
        "as many bytes, so that one beats the other"
    )
    single = RunSet([folder for folder in found if folder.name == "seed-0"]).read()
    assert "intervals over seeds" in write_html(page) and "intervals over seeds" not in write_html(single)
    assert "fedloom: 2 variants" in write_html(page) and chart(page, "bytes-ways").y.names == ["fedit", "florist"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_nobody_beats_the_front_and_everybody_else_is_beaten(points):
    front = set(find_front(points))

    def beaten(one):
        return any(o[0] <= one[0] and o[1] >= one[1] and o != one for o in points)

    assert all(beaten(one) != (place in front) for place, one in enumerate(points))


def test_attendance_says_who_was_asked_who_came_and_who_failed():
    rows = [
        RunRow("fedit", "m", ("a", "b", "c"), 2, 10, 0),
        Transfer(1, "a", "down", "change", 1),
        Transfer(1, "b", "down", "change", 1),
        Transfer(1, "a", "up", "update", 1),
        Transfer(1, "c", "down", "sum:keys", 1),
        Aggregation(1),
        Transfer(1, "c", "down", "change", 1, delivery=True),
        Transfer(2, "a", "down", "change", 1),
        Transfer(2, "c", "down", "change", 1),
        Roll(2, ("a",), {"c": "out of memory"}, {"b": "took too long"}),
    ]
    assert attend(rows) == {
        1: {"a": "answered", "b": "failed"},
        2: {"a": "answered", "c": "failed", "b": "late"},
    }
    assert attend(rows[:3])[1] == {"a": "waited for", "b": "waited for"}
    text = Reading(page_text(rows)).text
    assert "out of memory" in text and "took too long" in text


def test_sites_that_went_and_came_are_listed_with_their_reasons():
    rows = [
        RunRow("fedit", "m", CLIENTS, 2, 10, 0),
        Presence(1, CLIENTS),
        Presence(1, ("ada",), {"bob": "unplugged"}),
        Presence(2, CLIENTS),
        Note(2, "bob's update was refused", "refused"),
    ]
    tables = {block.id: block.rows for s in page_of_rows(rows).sections for block in s.blocks if hasattr(block, "rows")}
    assert tables["changes"] == [("2", "bob", "on", ""), ("1", "bob", "off", "unplugged")]
    assert tables["sites"] == [("ada", "on", ""), ("bob", "on", "")]
    assert tables["failures"] == [("2", "", "refused", "bob's update was refused")]


def test_stages_add_up_to_what_the_ledger_has():
    rows = [*told(), Roll(2, CLIENTS, seconds=5.0)]
    found = add_stages(rows)
    assert found[1] == pytest.approx(
        {"train": 2.0, "decode": 0.7, "compress": 0.4, "encode": 0.85, "aggregate": 1.25, "evaluate": 0.5}
    )
    assert found[2]["transfer"] == pytest.approx(4.0), "the roll's seconds beyond the slowest training"


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("model.layers.3.self_attn.q_proj", ("3", "q_proj")),
        ("model.layers.3.mlp.experts.down_proj.7", ("3", "down_proj.7")),
        ("lm_head", ("–", "lm_head")),
        ("transformer.h.11.attn.c_attn", ("11", "c_attn")),
    ],
)
def test_modules_have_their_place_on_the_map(module, place):
    assert place_module(module) == place


def test_the_map_has_every_module_once():
    page = page_of_rows(told())
    ranks = chart(page, "layers-rank")
    assert (ranks.x.names, ranks.y.names) == (["q_proj", "v_proj"], ["0", "1"])
    assert sorted(ranks.series[0].points) == [(0, 0, 4), (0, 1, 2), (1, 0, 4), (1, 1, 2)]
    assert (1, 1, None) in chart(page, "layers-energy").series[0].points


def test_predicted_stands_beside_measured(tmp_path):
    folder = written(tmp_path / "run", *told(), End(3, "finished"))
    write_prediction(folder, RunPrediction("florist", (600,) * 3, (1400,) * 3, 0))
    text = Reading(write_html(RunSet([folder]).read())).text
    assert "Predicted beside measured" in text and "+0.0 %" in text
    (folder / "prediction.json").write_text("{}")
    assert "Predicted" not in Reading(write_html(RunSet([folder]).read())).text, "no reason to have no page"
    assert ComparedRow("x", 0.0, 1.0).ratio is None


def test_a_page_stays_as_short_for_many_rounds_and_clients():
    few = page_of_rows(told(rounds=210, clients=tuple(f"c{n:04d}" for n in range(3))))
    many = page_of_rows(told(rounds=1050, clients=tuple(f"c{n:04d}" for n in range(3))))
    assert len(write_update(many)) < 1.15 * len(write_update(few))
    few = page_of_rows(told(rounds=2, clients=tuple(f"c{n:04d}" for n in range(220))))
    many = page_of_rows(told(rounds=2, clients=tuple(f"c{n:04d}" for n in range(2200))))
    assert len(write_update(many)) < 1.15 * len(write_update(few))
    assert "200 of 2,200 clients are shown, by name" in Reading(write_update(many)).text


def test_a_set_of_runs_is_read_again_where_they_grew(tmp_path):
    rows = list(told())
    folder, lock = written(tmp_path / "run", *rows[:14]), take_lock(tmp_path / "run")
    runs = RunSet([folder])
    first = runs.read()
    assert first.state == "running" and runs.read() is first
    with Ledger(folder / "ledger.jsonl") as ledger:
        for row in [*rows[14:], End(3, "finished")]:
            ledger.append(row)
    lock.close()
    second = runs.read()
    assert second.state == "over" and second.version != first.version
    assert len(chart(second, "loss-rounds").series[0].points) == 4


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no run: expected ledger.jsonl in it, or in a folder below"):
        find_runs([tmp_path])


def test_records_that_sites_keep_within_a_run_are_no_runs(tmp_path):
    written(tmp_path / "run", *told())
    written(tmp_path / "run" / "sites" / "a" / "jobs" / "1", *told())
    assert find_runs([tmp_path]) == [tmp_path / "run"]


CHART = Chart(
    "x",
    "lines",
    "A title",
    Axis("round"),
    Axis("sent", "bytes"),
    [Series("=a", [(1, 2048, 1024, 4096), (2, None)]), Series("b", [(2, 10)], 1)],
)


def test_the_table_and_the_csv_of_a_chart_say_its_numbers():
    head, rows = chart_table(CHART)
    assert head == ["round", "=a", "b"]
    assert rows == [["1", "2.0 KiB (1.0 KiB to 4.0 KiB)", "–"], ["2", "–", "10 B"]]
    assert list(csv.reader(io.StringIO(chart_csv(CHART)))) == [
        ["series", "round", "sent (bytes)", "low", "high"],
        ["'=a", "1", "2048", "1024", "4096"],
        ["'=a", "2", "", "", ""],
        ["b", "2", "10", "", ""],
    ]
    long = Chart("x", "lines", "t", Axis("round"), Axis("y"), [Series("a", [(n, n) for n in range(200)])])
    assert len(chart_table(long)[1]) == MOST_ROWS and chart_csv(long).count("\n") == 201


def test_figures_are_drawn_the_same_for_the_same_chart():
    page = page_of_rows(told())
    kinds = {one.chart.kind: one for one in list_figures(page)}
    kinds["dots"] = Figure(
        Chart(
            "f",
            "dots",
            "t",
            Axis("bytes", "bytes", log=True),
            Axis("%", "%"),
            [Series("a", [(9, 1, 0, 2)]), Series("-", [(9, 1), (900, 3)], -1)],
        )
    )
    assert set(kinds) == {"lines", "stack", "bars", "dots", "heat"}
    drawn = {kind: one.svg() for kind, one in kinds.items()}
    assert all(svg.startswith(b"<?xml") and b"<svg" in svg for svg in drawn.values())
    assert kinds["lines"].svg() == drawn["lines"] and kinds["bars"].png().startswith(b"\x89PNG")


def test_the_command_writes_the_page_and_its_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.report.page.draw.draw_chart", lambda chart, form: form.encode())
    folder = written(tmp_path / "run", *told(), End(3, "finished"))
    out, figures = tmp_path / "a" / "page.html", tmp_path / "figures"
    said = CliRunner().invoke(cli.app, ["report", str(folder), "--out", str(out), "--figures", str(figures)])
    assert said.exit_code == 0, said.output
    assert "florist" in Reading(out.read_text(encoding="utf-8")).text
    names = {one.name for one in list_figures(RunSet([folder]).read())}
    assert {path.name for path in figures.iterdir()} == {f"{n}.{end}" for n in names for end in ("csv", "svg", "png")}


def test_the_command_does_not_mark_a_run_in_progress_as_complete(tmp_path):
    folder = written(tmp_path / "run", *told())
    with take_lock(folder):
        said = CliRunner().invoke(cli.app, ["report", str(folder), "--out", str(folder / "report.html")])
    assert said.exit_code and not (folder / "report.html").exists()


def test_the_bundle_is_of_the_version_that_the_scripts_pin():
    root = Path(__file__).parents[2]
    pinned = json.loads((root / "scripts" / "charts" / "package.json").read_text())["dependencies"]["echarts"]
    assets = root / "src" / "fedloom" / "report" / "page" / "assets"
    bundle = (assets / "echarts.min.js").read_text(encoding="utf-8")
    assert bundle.startswith((root / "scripts" / "charts" / "notice.txt").read_text()) and f'"{pinned}"' in bundle
    assert "</script" not in bundle and "<!--" not in bundle
    assert "Apache License" in (assets / "echarts.LICENSE.txt").read_text(encoding="utf-8")
