"""The ledger: what was appended is what is read, whatever happened to the last line."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import CheckpointError
from fedloom.records.ledger import (
    Aggregation,
    Evaluation,
    Ledger,
    Note,
    RunRow,
    Totals,
    Training,
    Transfer,
    read_rows,
    totals,
)
from fedloom.report import summarise

ROWS = [
    RunRow("fedsrd", "model", ("ada", "bob"), 2, 1000, 3),
    Evaluation(0, "bank", 0.25, 2.0),
    Training(1, "ada", 1.5, 10, 100, 0.3),
    Transfer(1, "ada", "up", "update", 120, {"header": 20, "values": 100}, 0.01),
    Transfer(1, "bob", "up", "update", 80, {"header": 20, "values": 60}),
    Aggregation(1, {"mean_rank": 4.0}, 0.1),
    Note(1, "client bob dropped out"),
    Transfer(2, "ada", "down", "change", 50, {"header": 20, "values": 30}),
    Evaluation(1, "bank", 0.75, 0.5),
]


def filled(path, rows=ROWS):
    with Ledger(path) as ledger:
        for row in rows:
            ledger.append(row)
    return path


def test_rows_come_back_as_they_were(tmp_path):
    path = filled(tmp_path / "ledger.jsonl")
    assert read_rows(path) == ROWS
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())


def test_a_loss_that_is_not_finite_is_still_json(tmp_path):
    path = filled(tmp_path / "l", [Training(1, "ada", math.nan, 1, 1), Aggregation(1, {"x": math.inf})])
    assert json.loads(path.read_text().splitlines()[0])["loss"] is None
    first, second = read_rows(path)
    assert math.isnan(first.loss)
    assert math.isnan(second.stats["x"])


def test_totals_by_client_round_and_part():
    assert totals(ROWS) == Totals(
        transfers=3,
        bytes_up=200,
        bytes_down=50,
        by_client={"ada": (120, 50), "bob": (80, 0)},
        by_round={1: (200, 0), 2: (0, 50)},
        by_part={"header": 60, "values": 190},
    )
    assert totals(ROWS).bytes == 250


def test_totals_do_not_depend_on_seconds_or_order():
    slow = [Transfer(r.round, r.client, r.direction, r.kind, r.bytes, r.parts, 9.0) for r in ROWS[3:5]]
    assert totals(reversed(slow)) == totals(ROWS[3:5])


def test_running_sums_survive_reopening(tmp_path):
    path = filled(tmp_path / "l")
    with Ledger(path) as ledger:
        assert (ledger.rows, ledger.bytes_up, ledger.bytes_down) == (len(ROWS), 200, 50)
        ledger.note(2, "more")
        assert ledger.sync() == len(ROWS) + 1
        assert len(read_rows(path)) == len(ROWS) + 1


@given(st.integers(0, 10_000))
def test_any_truncated_file_reads_as_the_rows_that_are_whole(tmp_path_factory, cut):
    path = filled(tmp_path_factory.mktemp("ledger") / "l")
    content = path.read_bytes()
    content = content[: cut % (len(content) + 1)]
    path.write_bytes(content)
    whole = content.count(b"\n")
    assert read_rows(path) == ROWS[:whole]
    with Ledger(path) as ledger:
        ledger.append(ROWS[0])
    assert read_rows(path) == [*ROWS[:whole], ROWS[0]]


@pytest.mark.parametrize("keep", range(len(ROWS) + 1))
def test_truncating_forgets_exactly_what_followed(tmp_path, keep):
    path = filled(tmp_path / "l")
    with Ledger(path) as ledger:
        ledger.note(2, "not yet synced")
        ledger.truncate_to(keep)
        sums = totals(ROWS[:keep])
        assert (ledger.bytes_up, ledger.bytes_down) == (sums.bytes_up, sums.bytes_down)
        for row in ROWS[keep:]:
            ledger.append(row)
    assert path.read_bytes() == filled(tmp_path / "undisturbed").read_bytes()


def test_a_ledger_shorter_than_the_checkpoint_says_is_refused(tmp_path):
    with Ledger(filled(tmp_path / "l")) as ledger, pytest.raises(CheckpointError, match="was shortened"):
        ledger.truncate_to(len(ROWS) + 1)


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"nonsense",
        b'{"row": "transfer"}',
        b'{"row": "bribe", "round": 1}',
        b'{"row": "note", "round": "1", "text": "x"}',
        b'{"row": "note", "round": 1, "text": "x", "extra": 1}',
        b'{"row":"transfer","round":1,"client":"a","direction":"left","kind":"update","bytes":1}',
        b'{"row": "note", "round": 1, "text": "\xff"}',
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = filled(tmp_path / "ledger.jsonl")
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]) + b"\n")
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl, line 3 is not a row of a ledger"):
        read_rows(path)


def test_a_missing_ledger(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.jsonl cannot be read"):
        read_rows(tmp_path / "none.jsonl")


BAD_ROWS = [
    Training(1, "ada", 0.5, math.inf, 1),
    Training(1, "ada", 0.5, 1.5, 1),
    Training(1, 7, 0.5, 1, 1),
    Transfer(1, "ada", "sideways", "update", 1),
    Evaluation(0, "\ud800", 0.5, 1.0),
]


@pytest.mark.parametrize("row", BAD_ROWS, ids=ascii)
def test_a_row_that_could_not_be_read_back_is_not_written(tmp_path, row):
    told = []
    with Ledger(tmp_path / "ledger.jsonl", lambda row, line: told.append(row)) as ledger:
        ledger.append(ROWS[0])
        with pytest.raises(CheckpointError, match=rf"ledger\.jsonl: a row of kind '{row.row}' cannot be kept"):
            ledger.append(row)
        ledger.append(ROWS[1])
        assert ledger.rows == 2
    assert read_rows(tmp_path / "ledger.jsonl") == ROWS[:2] == told


def test_seconds_that_an_older_version_wrote_as_null_are_read(tmp_path):
    path = filled(tmp_path / "l")
    line = b'{"row":"training","round":1,"client":"eve","loss":1.0,"steps":3,"examples":10,"seconds":null}\n'
    path.write_bytes(path.read_bytes() + line)
    assert math.isnan(read_rows(path)[-1].seconds)
    assert summarise(read_rows(path)).train_seconds == pytest.approx(0.3)


def test_seconds_that_are_not_finite_can_be_read_back(tmp_path):
    rows = [Training(1, "ada", 0.5, 1, 1, math.inf), Evaluation(0, "bank", 0.5, 1.0, math.nan)]
    assert all(math.isnan(row.seconds) for row in read_rows(filled(tmp_path / "l", rows)))
