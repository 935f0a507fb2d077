"""How a run stands, told from its ledger: on a terminal, for log shippers, for Prometheus."""

import io
import json
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedloom.cli import main as cli
from fedloom.errors import CheckpointError
from fedloom.records.ledger import Aggregation, Evaluation, Ledger, Note, Roll, RunRow, Training, Transfer, read_rows
from fedloom.records.serverlog import ServerLog, log_level
from fedloom.records.session import End
from fedloom.report.answers import count_answers
from fedloom.report.metrics import prometheus_text
from fedloom.report.status import is_finished, render_folder, render_rows

RUN = RunRow(method="fedsrd", model="m", clients=("ada", "bob"), num_rounds=2, adapter_values=1000, seed=0)
LOCAL = [
    RUN,
    Transfer(1, "ada", "up", "update", 300),
    Transfer(1, "bob", "up", "update", 500),
    Training(1, "ada", 0.5, 3, 10, 2.0),
    Training(1, "bob", 0.25, 3, 10, 1.0),
    Aggregation(1, {}, 0.5),
    Evaluation(1, "x", 0.25, 1.0),
    Transfer(2, "ada", "down", "change", 100),
    Transfer(2, "bob", "down", "change", 100),
    Note(2, "client bob dropped out after the download"),
    Transfer(2, "ada", "up", "update", 300),
    Training(2, "ada", 0.125, 3, 10, 2.0),
    Aggregation(2, {}, 0.5),
    Transfer(2, "ada", "down", "change", 70),
    Transfer(2, "bob", "down", "change", 70),
]
ACROSS = [
    RUN,
    Transfer(1, "ada", "up", "update", 300),
    Roll(1, ("ada",), {"bob": 'said "no"\n'}, {}, tries=3, seconds=9.0),
    Aggregation(1, {}, 0.5),
    Transfer(2, "bob", "down", "change", 100),
    Transfer(2, "bob", "up", "update", 100),
    Roll(2, ("bob",), {}, {"ada": "late"}),
]


def samples(text):
    """The file as Prometheus reads it: {name{labels}: value}; every line must be well formed."""
    found, kinds = {}, set()
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) fedloom_[a-z_]+ .+", line)
            kinds.add(line.split()[2])
            continue
        match = re.fullmatch(r'(fedloom_[a-z_]+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*\}) (\S+)', line)
        assert match and match[1] in kinds, line
        found[match[1], match[2]] = float(match[3])
    return found


def test_rounds_bytes_and_failures_are_those_of_the_ledger():
    found = samples(prometheus_text(LOCAL, "r", 1e9))
    base = 'run="r",method="fedsrd"'
    assert found["fedloom_rounds_done_total", f"{{{base}}}"] == 2
    assert found["fedloom_payload_bytes_total", f'{{{base},site="ada",direction="up"}}'] == 600
    assert found["fedloom_payload_bytes_total", f'{{{base},site="bob",direction="down"}}'] == 170
    assert found["fedloom_payloads_total", f"{{{base}}}"] == 7
    assert found["fedloom_failures_total", f'{{{base},site="bob"}}'] == 1
    assert found["fedloom_failures_total", f'{{{base},site="ada"}}'] == 0
    assert found["fedloom_exact_match", f'{{{base},domain="x"}}'] == 0.25
    assert found["fedloom_training_loss", f'{{{base},site="ada"}}'] == 0.125
    assert found["fedloom_training_seconds_total", f"{{{base}}}"] == 5


def test_a_roll_is_believed_and_retries_and_late_answers_are_counted():
    found = samples(prometheus_text(ACROSS, "r", 1e9))
    base = 'run="r",method="fedsrd"'
    assert found["fedloom_retries_total", f"{{{base}}}"] == 2
    assert found["fedloom_late_answers_total", f"{{{base}}}"] == 1
    assert found["fedloom_failures_total", f'{{{base},site="bob"}}'] == 1
    assert found["fedloom_answers_total", f'{{{base},site="bob"}}'] == 1


def test_names_that_would_break_a_line_are_escaped():
    odd = 'a"b\\c\nd'
    found = samples(
        prometheus_text([RUN, Transfer(1, odd, "up", "update", 3), Transfer(1, odd + "\n", "up", "update", 4)], "r", 1e9)
    )
    told = [labels for name, labels in found if name == "fedloom_payload_bytes_total" and 'direction="up"' in labels]
    assert len(set(told)) == 2 and all('site="a\\"b\\\\c\\\\nd' in labels for labels in told)


def test_every_held_out_score_is_a_metric():
    row = Evaluation(2, "bank", 0.0, 2.0, examples=5, tokens=30, bytes=60, metrics={"chrf": 0.25})
    lines = prometheus_text([*LOCAL, row], "r", 1e9).splitlines()
    where = 'run="r",method="fedsrd",domain="bank"'
    assert f"fedloom_exact_match{{{where}}} 0" in lines
    assert f"fedloom_heldout_loss{{{where}}} 2" in lines
    assert f"fedloom_heldout_bits_per_byte{{{where}}} {row.bits_per_byte!r}" in lines
    assert f'fedloom_heldout_metric{{{where},metric="chrf"}} 0.25' in lines
    assert not any("heldout_metric" in line for line in prometheus_text(LOCAL, "r", 1e9).splitlines())


def test_a_ledger_without_a_run_has_no_metrics():
    with pytest.raises(CheckpointError, match="first row"):
        prometheus_text(LOCAL[1:], "r", 1e9)


def test_who_was_asked_in_vain_is_known_before_and_after_the_round_is_over():
    assert {name: (a.answered, a.missed, a.last) for name, a in count_answers(LOCAL).items()} == {
        "ada": (2, 0, 2),
        "bob": (1, 1, 1),
    }
    under_way = count_answers(LOCAL[:10])
    assert (under_way["bob"].missed, under_way["ada"].answered) == (0, 1)


def text_of(shown_view):
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(shown_view)
    return console.export_text()


def test_the_view_says_who_is_missing():
    text = text_of(render_rows(ACROSS, 12.0))
    assert "round 1/2" in text and "last row 12 s ago" in text and "without ada" in text
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("bob"))
    assert row[:4] == ["bob", "1", "1", "2"]
    text = text_of(render_rows(LOCAL, 12.0))
    assert "finished" in text and "dropped out" in text and "25.0 %" in text
    assert is_finished(LOCAL) and not is_finished(ACROSS)


def test_the_view_says_how_a_run_ended():
    assert "failed: no" in text_of(render_rows([*ACROSS, End(2, "failed", "no updates")], 12.0))
    assert "interrupted" in text_of(render_rows([*ACROSS, End(2, "interrupted")], 12.0))
    assert is_finished([*ACROSS, End(2, "failed", "x")]), "who follows a run that failed does not wait for ever"
    assert log_level(End(2, "failed")) == "error" and log_level(End(2, "finished")) == "info"


def test_every_row_is_logged_with_its_time_and_stays_when_the_ledger_is_cut_back(tmp_path):
    log = ServerLog(tmp_path / "log.jsonl")
    with Ledger(tmp_path / "ledger.jsonl", log.row) as ledger:
        for row in ACROSS:
            ledger.append(row)
        ledger.truncate_to(1)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == len(ACROSS) and len(read_rows(tmp_path / "ledger.jsonl")) == 1
    assert [line["event"] for line in lines] == [row.row for row in ACROSS]
    assert [line["level"] for line in lines if line["event"] == "roll"] == ["warning", "warning"]
    assert lines[1]["bytes"] == 300 and lines[0]["time"] <= lines[-1]["time"]


def test_what_json_lacks_is_logged_as_null(tmp_path):
    log = ServerLog(tmp_path / "log.jsonl")
    log.row(Training(1, "ada", float("nan"), 3, 10))
    log.close()
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text)["loss"] is None and "NaN" not in text


def test_the_command_shows_a_run_and_refuses_what_is_none(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        for row in LOCAL:
            ledger.append(row)
    told = CliRunner().invoke(cli.app, ["status", str(tmp_path)])
    assert told.exit_code == 0 and "fedsrd: 2 clients" in told.stdout
    assert text_of(render_folder(tmp_path)).splitlines()[0] == told.stdout.splitlines()[0]
    missing = CliRunner().invoke(cli.app, ["status", str(tmp_path / "nowhere")])
    assert missing.exit_code == 2 and "has begun" in missing.stderr
