"""Hostile names and texts through everything that shows them: terminal, picture, page, tables, logs, metrics."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from experiments.points import Point
from hypothesis import given, settings
from rich.console import Console, RenderableType
from test_status import samples
from typer.testing import CliRunner

from experiments import picture
from fedloom.cli import main as cli
from fedloom.cli.inspect import describe_path
from fedloom.errors import CheckpointError
from fedloom.records.configfile import parse
from fedloom.records.events import RunFacts
from fedloom.records.ledger import (
    Aggregation,
    Evaluation,
    Layers,
    Ledger,
    Note,
    Presence,
    Roll,
    Row,
    RunRow,
    Training,
    Transfer,
    read_rows,
)
from fedloom.records.lock import Writer
from fedloom.records.serverlog import ServerLog
from fedloom.report import figure, summarise, write_report
from fedloom.report.live import LineView, LiveView
from fedloom.report.metrics import prometheus_text
from fedloom.report.page import list_figures, page_of, write_html, write_update
from fedloom.report.standing import judge_standing
from fedloom.report.status import render_rows
from fedloom.report.tables import closing_tables, comparison_rows, comparison_table, to_markdown
from fedloom.report.tables import to_csv as as_csv
from fedloom.studies import compare
from fedloom.wire import Message, encode
from fedloom.workspace.folder import RunFolder
from hostile import NAMES, WHOLE, is_tame
from page_reading import Reading
from wire_samples import HEADER, dense

FEW = settings(max_examples=15)


def rows(name: str, text: str) -> list[Row]:
    """A run of two rounds in which everything that may be another's text is."""
    ledger: list[Row] = [RunRow(name, name, (name, "bob"), 2, 1000, 0)]
    ledger.append(Evaluation(0, name, 0.1, 2.0))
    for round in (1, 2):
        ledger.append(Transfer(round, name, "up", "update", 300, {name: 300}))
        ledger.append(Training(round, name, 0.5, 3, 10, 1.0))
        ledger.append(Roll(round, (name,), {"bob": text}, {"bob": text}, 2))
        ledger.append(Aggregation(round, {name: 1.0}, 0.1))
        ledger.append(Evaluation(round, name, 0.4, 1.0))
    ledger.append(Presence(2, (name,), {"bob": text}))
    ledger.append(Layers(2, (name, f"{name}.1"), (4, 4), (0.5, 1.0), (1.0, 2.0)))
    return [*ledger, Note(2, text, "refused")]


PLAIN = rows("ada", "away")


def screened(shown: RenderableType) -> str:
    """What reaches a terminal that understands colours and links; rich's own sequences are taken out again."""
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="truecolor")
    console.print(shown)
    text = console.file.getvalue()
    assert "\x1b]8" not in text
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def live(name: str, text: str) -> LiveView:
    seen = LiveView()
    seen.run_started(RunFacts(name, name, (name, "bob"), 2, 1000, Path("run"), warnings=(text,)))
    seen.client_started(1, name)
    seen.client_finished(1, name, 0.5, 300, 0)
    seen.client_started(1, name)
    seen.round_finished(1, 2, {name: Evaluation(1, name, 0.4, 1.0)}, 300, 0, 1.0)
    return seen


@FEW
@given(WHOLE, WHOLE)
def test_no_name_is_code_for_a_terminal(name: str, text: str):
    report = summarise(rows(name, text))
    found = comparison_rows({name: [report]})
    for shown in (
        live(name, text),
        closing_tables(report),
        render_rows(rows(name, text), judge_standing(rows(name, text), Writer(True, 7, name), 3.0)),
        comparison_table(found),
    ):
        assert is_tame(screened(shown))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is_written(name: str):
    shown = screened(closing_tables(summarise(rows(name, name)))) + screened(live(name, name))
    if is_tame(name) and 0 < len(name) < 40 and name.strip() == name:
        assert name in shown


@FEW
@given(WHOLE, WHOLE)
def test_plain_lines_are_tame(name: str, text: str):
    console = Console(file=io.StringIO(), width=120)
    lines = LineView(console)
    lines.run_started(RunFacts(name, name, (name,), 2, 1000, Path("run"), warnings=(text,)))
    lines.round_finished(1, 2, {name: Evaluation(1, name, 0.4, 1.0)}, 300, 0, 1.0)
    assert is_tame(console.file.getvalue()) and console.file.getvalue().count("\n") == 3


@settings(max_examples=4)
@given(WHOLE)
def test_a_name_is_drawn_as_it_is_written(name: str):
    report, held = summarise(rows(name, name)), io.BytesIO()
    figure.draw_curve(report, held)
    assert held.getvalue().startswith(b"\x89PNG")
    drawing = io.BytesIO()
    figure.draw_curve(report, drawing, form="svg")
    drawn = drawing.getvalue().decode()
    assert "<script" not in drawn and "onerror" not in re.sub(r"<!--.*?-->", "", drawn, flags=re.S)


@pytest.mark.parametrize("name", [r"$\frac{$", "_hidden", "银行", "\x1b]0;x\x07"])
def test_all_pictures_take_such_names(name: str):
    report = summarise(rows(name, name))
    point = Point(name, "published", name, 1, 0.5, 1.0, 1.0, 10.0, 10.0, 0.0, 1.0, (1.0, 1.0, 1.0), 9.0, name)
    for draw in (
        lambda held: figure.draw_comparison({name: [report], "other": [report]}, held),
        lambda held: picture.front([point], held),
        lambda held: figure.draw_curve(report, held),
    ):
        held = io.BytesIO()
        draw(held)
        assert held.getvalue().startswith(b"\x89PNG")


def test_a_name_with_an_underscore_has_its_place_in_the_legend():
    assert len({figure.legend_label("_x"), figure.legend_label("x"), figure.legend_label("y")}) == 3
    assert not figure.legend_label("_x").startswith("_")


@settings(max_examples=4)
@given(WHOLE, WHOLE)
def test_no_name_is_code_for_a_browser(name: str, text: str):
    """Not in the page, not in the data that its script reads, and not in what a live page is sent."""
    held = rows(name, text)
    page = page_of(Path("runs") / "x", summarise(held), held)
    parsed, plain = Reading(write_html(page)), Reading(write_html(page_of(Path("runs/x"), summarise(PLAIN), PLAIN)))
    assert parsed.tags.count("script") == plain.tags.count("script") == 4
    code = [script for kind, script in parsed.scripts if not kind]
    assert code == [script for kind, script in plain.scripts if not kind], "no script but those of the package"
    assert not {"img", "iframe", "foreignobject"} & set(parsed.tags) and parsed.tags.count("link") == 1
    assert all(link.startswith(("#", "data:image/svg+xml,%3Csvg")) for link in parsed.links)
    assert not [key for key in parsed.keys if key.startswith("on")]
    assert is_tame(parsed.text)
    (data,) = (script for kind, script in parsed.scripts if kind == "application/json")
    assert "<" not in data and json.loads(data)["charts"]
    update = Reading(json.loads(write_update(page))["main"])
    assert not {"script", "img", "iframe", "link"} & set(update.tags) and is_tame(update.text)


@settings(max_examples=4)
@given(WHOLE)
def test_every_figure_takes_any_name(name: str):
    held = rows(name, name)
    for one in list_figures(page_of(Path("runs/x"), summarise(held), held)):
        for line in csv.reader(io.StringIO(one.csv())):
            assert all(is_tame(cell) and not cell.startswith(("=", "@")) for cell in line)
        assert re.fullmatch(r"[a-z0-9-]+", one.name), "it names files"


@given(WHOLE)
def test_no_cell_is_computed_by_a_spreadsheet(name: str):
    found = [{"run": name, "seeds": "1", "change": "-1.5"}]
    (head, cells) = list(csv.reader(io.StringIO(as_csv(found))))
    assert head == ["run", "seeds", "change"] and cells[1:] == ["1", "-1.5"]
    assert not cells[0].lstrip().startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠")) or _number(cells[0])
    assert is_tame(cells[0])


def _number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", text, re.ASCII) is not None


@given(WHOLE)
def test_a_markdown_table_keeps_its_rows_and_columns_and_holds_no_html(name: str):
    text = to_markdown([{"run": name, "seeds": "1"}])
    lines = text.splitlines()
    assert len(lines) == 3 and is_tame(text)
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3 for line in lines)
    assert "<" not in text and not re.search(r"(?<!\\)(?:\\\\)*[\[`*$]", lines[2])


def test_a_markdown_cell_is_written_so_that_it_shows():
    text = to_markdown([{"run": r"_a_ b_c | * [x](y) <i> \ `q`", "seeds": "1 ± 2"}])
    assert text.splitlines()[2] == r"| \_a\_ b_c \| \* \[x\](y) &lt;i&gt; \\ \`q\` | 1 ± 2 |"


@given(WHOLE, WHOLE)
def test_metrics_are_well_formed_and_tame(name: str, text: str):
    written = prometheus_text(rows(name, text), name, 1e9)
    assert is_tame(written)
    assert samples(written)["fedloom_retries_total", _labels(written, "fedloom_retries_total")] == 2
    series = [line.rpartition(" ")[0] for line in written.splitlines() if not line.startswith("#")]
    assert len(series) == len(set(series))


def _labels(written: str, name: str) -> str:
    line = next(line for line in written.splitlines() if line.startswith(f"{name}{{"))
    return line.removeprefix(name).rpartition(" ")[0]


@given(WHOLE, WHOLE)
def test_ledger_and_log_say_the_same_in_tame_characters(tmp_path_factory, name: str, text: str):
    folder = tmp_path_factory.mktemp("run")
    log, given = ServerLog(folder / "log.jsonl"), rows(name, text)
    with Ledger(folder / "ledger.jsonl", log.row) as ledger:
        for row in given:
            ledger.append(row)
    log.close()
    assert read_rows(folder / "ledger.jsonl") == given
    for file in ("ledger.jsonl", "log.jsonl"):
        written = (folder / file).read_bytes().decode()
        assert is_tame(written) and len(written.splitlines()) == len(given)
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_bytes().splitlines()]
    assert logged[0]["clients"] == [name, "bob"] and logged[-1]["text"] == text


@pytest.mark.parametrize("name", ["\ud800", "a\udc00b"])
def test_half_of_a_surrogate_pair_is_refused_before_anything_is_written(tmp_path: Path, name: str):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        with pytest.raises(CheckpointError, match=r"ledger\.jsonl: a row of kind 'run' cannot be kept"):
            ledger.append(rows(name, "x")[0])
        ledger.note(1, name)
        assert ledger.rows == 1
    assert len(read_rows(tmp_path / "ledger.jsonl")) == 1


def test_the_commands_show_a_run_with_such_names(tmp_path: Path):
    for number, name in enumerate(NAMES):
        (tmp_path / str(number)).mkdir()
        with Ledger(tmp_path / str(number) / "ledger.jsonl") as ledger:
            for row in rows(name, name):
                ledger.append(row)
        for command in ("status", "inspect"):
            told = CliRunner().invoke(cli.app, [command, str(tmp_path / str(number))])
            assert told.exit_code == 0 and is_tame(told.stdout), (command, name)
    assert screened(describe_path(tmp_path / "0"))
    write_report(tmp_path / "4")
    assert (tmp_path / "4" / "report.html").exists()


def test_an_error_reaches_the_terminal_in_tame_lines(tmp_path: Path):
    told = CliRunner().invoke(cli.app, ["inspect", f"{tmp_path}/\x1b]0;x\x07[/x]\x9b\u202e"])
    assert told.exit_code == 2 and is_tame(told.stderr) and r"\x1b]0;x\x07[/x]\x9b\u202e" in told.stderr


def test_kept_payloads_of_two_names_are_two_files(tmp_path: Path):
    payload = encode(Message(HEADER, {"m/A": dense((4, 6), "fp32", 1)}))
    config = parse({"output": {"keep_payloads": True}}, "here")
    names = ["a b", "a/b", "é", "ü", "..", "", "x" * 5000]
    with RunFolder.open(tmp_path / "run", config, resume=False) as folder:
        for name in names:
            folder.transfer(1, name, "up", payload)
    assert len(list((tmp_path / "run" / "payloads").iterdir())) == len(names)


def test_folders_of_a_comparison_stay_in_it_and_apart(tmp_path: Path):
    names = [name for name in NAMES if 0 < len(name) <= 256]  # as long as settings allow
    config = parse({}, "here")
    made = [run for name in names for run in _alone(config, name, tmp_path)]
    assert {run.folder.parent.parent for run in made} == {tmp_path}
    assert len({run.folder for run in made}) == len(names)
    assert [run.config.federation.participants for run in made] == [(name,) for name in names]


def _alone(config: object, name: str, out: Path) -> Sequence[compare.Trial]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "client_names", lambda config: [name])
        return compare.plan_runs(config, ["alone"], [0], out)
