"""How a run stands, told from its ledger: on a terminal, for log shippers, for Prometheus."""

import fcntl
import io
import json
import os
import platform
import re
import shlex
import threading

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedloom.cli import main as cli
from fedloom.errors import CheckpointError
from fedloom.records.ledger import (
    Aggregation,
    Evaluation,
    Ledger,
    Note,
    Presence,
    Roll,
    RunRow,
    Training,
    Transfer,
    read_rows,
)
from fedloom.records.lock import LOCK, Writer, find_writer, take_lock
from fedloom.records.serverlog import ServerLog, log_level
from fedloom.records.session import End, Session
from fedloom.report.answers import count_answers
from fedloom.report.metrics import prometheus_text
from fedloom.report.standing import judge_standing, read_run
from fedloom.report.status import render_rows

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
    rows = [RUN, Transfer(1, odd, "up", "update", 3), Transfer(1, odd + "\n", "up", "update", 4)]
    found = samples(prometheus_text(rows, "r", 1e9))
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


def shown(rows, alive=True, quiet=12.0):
    return text_of(render_rows(rows, judge_standing(rows, Writer(alive, 4711, "here"), quiet)))


def test_the_view_says_who_is_missing():
    text = shown(ACROSS)
    assert "round 1/2" in text and "last row 12.0 s ago" in text and "without ada" in text
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("bob"))
    assert row[:4] == ["bob", "1", "1", "2"]
    text = shown(LOCAL, alive=False)
    assert "finished" in text and "dropped out" in text and "25.0 %" in text


def test_a_run_that_waits_says_for_whom_and_why_they_are_not_there():
    begun = [RUN, Presence(1, ("ada",), {"bob": "is not connected"})]
    text = shown(begun)
    assert "waiting for ada, bob" in text and "missing: bob is not connected" in text
    training = [*ACROSS[:5], Presence(2, ("ada", "bob"))]
    assert "waiting for bob" in shown(training) and "missing" not in shown(training)
    assert "waiting" not in shown([*ACROSS, Transfer(2, "ada", "down", "state", 9, delivery=True)]), "the round is over"
    assert "waiting" not in shown([*training, End(1, "interrupted")], alive=False)


def test_the_view_says_how_a_run_ended():
    failed, stopped = End(2, "failed", "no updates"), End(2, "interrupted")
    assert "failed: no updates" in shown([*ACROSS, failed], alive=False)
    assert "interrupted" in shown([*ACROSS, stopped], alive=False)
    assert log_level(failed) == "error" and log_level(End(2, "finished")) == "info"


@pytest.mark.parametrize(
    ("rows", "alive", "state"),
    [
        (ACROSS, True, "running"),
        (ACROSS, False, "gone"),
        (ACROSS, None, "running"),  # on another machine: nobody here can tell
        (LOCAL, True, "running"),  # the result is being delivered
        (LOCAL, False, "finished"),  # a ledger of before its end was a row
        ([*LOCAL, End(2, "finished")], True, "finished"),
        ([*ACROSS, End(2, "failed", "no updates")], False, "failed"),
        ([*ACROSS, End(2, "failed", "no updates")], True, "running"),  # it goes on and has not written yet
        ([*ACROSS, End(2, "interrupted")], False, "interrupted"),
    ],
)
def test_who_follows_a_run_waits_for_as_long_as_somebody_plays_it(rows, alive, state):
    standing = judge_standing(rows, Writer(alive), 3.0, "fedloom run")
    assert (standing.state, standing.is_over) == (state, state != "running")
    assert standing.is_well == (state in ("running", "finished"))
    assert bool(standing.again) == (state in ("failed", "interrupted", "gone"))


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


def written(folder, rows):
    folder.mkdir(exist_ok=True)
    with Ledger(folder / "ledger.jsonl") as ledger:
        for row in rows:
            ledger.append(row)


def asked(folder):
    told = CliRunner().invoke(cli.app, ["status", str(folder), "--once"], env={"COLUMNS": "200"})
    return told.exit_code, told.stdout


def test_the_command_shows_a_run_and_refuses_what_is_none(tmp_path):
    written(tmp_path, LOCAL)
    code, text = asked(tmp_path)
    assert code == 0 and text.startswith("fedsrd: 2 clients") and "go on with" not in text
    missing = CliRunner().invoke(cli.app, ["status", str(tmp_path / "nowhere")])
    assert missing.exit_code == 2 and "has begun" in missing.stderr


def test_the_command_tells_a_run_that_goes_on_from_one_that_was_killed(tmp_path):
    run = tmp_path / "my run"
    written(run, ACROSS)
    (run / "job").write_text("0123456789abcdef")
    with take_lock(run):
        code, text = asked(run)
        assert code == 0 and "last row" in text and "not running" not in text
    code, text = asked(run)
    assert code == 1 and f"not running: process {os.getpid()}" in text
    command = text.splitlines()[-1].removeprefix("go on with: ")
    assert shlex.split(command)[1:] == [
        *("run", f"{run}/config.toml", "--out", str(run), "--engine", "flower", "--resume"),
    ]  # fmt: skip


def test_a_run_that_is_being_set_up_is_no_mistake_of_whoever_looks(tmp_path):
    with take_lock(tmp_path), pytest.raises(CheckpointError, match="is being set up by process"):
        read_run(tmp_path)


def test_a_failed_run_has_an_exit_code_and_its_reason(tmp_path):
    written(tmp_path, [*ACROSS, End(2, "failed", "2 sites are too few")])
    code, text = asked(tmp_path)
    assert code == 1 and "failed: 2 sites are too few" in text and "--resume" in text


def test_a_lock_of_another_machine_is_not_believed(tmp_path, monkeypatch):
    take_lock(tmp_path).close()
    assert find_writer(tmp_path) == Writer(False, os.getpid(), platform.node())
    (tmp_path / LOCK).write_text("12 elsewhere\n")
    assert find_writer(tmp_path) == Writer(None, 12, "elsewhere")
    assert find_writer(tmp_path / "nowhere") == Writer(False)


def test_who_looks_at_a_folder_does_not_keep_a_run_out(tmp_path):
    """A look holds the lock for an instant: whoever wants it tries again."""
    take_lock(tmp_path).close()
    looking = (tmp_path / LOCK).open()
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.1, looking.close).start()
    with take_lock(tmp_path):
        assert find_writer(tmp_path).alive


def test_prometheus_learns_how_a_run_stands_who_is_there_and_when_certificates_end():
    day = 86400.0
    began = Session(0, "2026-11-01T00:00:00+00:00", "", certificates={"server": "1970-02-10T00:00:00+00:00"})
    rows = [RUN, began, Presence(1, ("ada",), {"bob": "is not connected"}), *ACROSS[1:]]
    found = samples(prometheus_text(rows, "first", 10 * day))
    base = 'run="first",method="fedsrd"'
    assert {name.count("run=") for _, name in found} == {1}, "every sample says which run it is of"
    assert found["fedloom_site_online", f'{{{base},site="ada"}}'] == 1
    assert found["fedloom_site_online", f'{{{base},site="bob"}}'] == 0
    assert found["fedloom_certificate_days_left", f'{{{base},certificate="server"}}'] == 30
    assert found["fedloom_certificate_end_timestamp_seconds", f'{{{base},certificate="server"}}'] == 40 * day
    assert found["fedloom_last_update_timestamp_seconds", f"{{{base}}}"] == 10 * day
    for rows_so_far, state in ((rows, "running"), ([*rows, End(2, "failed", "x")], "failed")):
        found = samples(prometheus_text(rows_so_far, "first", 10 * day))
        states = {name: value for (metric, name), value in found.items() if metric == "fedloom_run_state"}
        assert [name for name, value in states.items() if value] == [f'{{{base},state="{state}"}}'] and len(states) == 4


def test_rounds_missed_in_a_row_begin_anew_with_an_answer():
    def missed(rows):
        found = samples(prometheus_text([RUN, *rows], "r", 1e9))
        return found["fedloom_site_missed_rounds", '{run="r",method="fedsrd",site="bob"}']

    rolls = [Roll(round, ("ada",), {"bob": "did not answer in time"}) for round in (1, 2, 3)]
    assert missed(rolls) == 3
    assert missed([*rolls, Roll(4, ("ada", "bob"))]) == 0
