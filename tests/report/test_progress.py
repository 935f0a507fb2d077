"""What is kept of rows as they come is what reading them all anew would give; long runs are sampled on the page."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedloom.records import ledger as ledgers
from fedloom.records.ledger import (
    Aggregation,
    Choice,
    Evaluation,
    Note,
    Roll,
    RunRow,
    Training,
    Transfer,
    read_rows,
)
from fedloom.records.lock import Writer
from fedloom.records.session import End
from fedloom.report.answers import Answers, count_answers
from fedloom.report.curves import points_of
from fedloom.report.live import EventKeeper
from fedloom.report.measures import TRAINING_LOSS, order_measures
from fedloom.report.metrics import MOST_SITES, prometheus_text
from fedloom.report.numbers import summarise
from fedloom.report.page import page_of, write_update
from fedloom.report.progress import Progress
from fedloom.report.sampling import MOST, sample
from fedloom.report.standing import judge_progress
from fedloom.report.status import WatchedRun, render_progress

CLIENTS = ("ada", "bob", "cyd")
RUN = RunRow(method="fedsrd", model="m", clients=CLIENTS, num_rounds=9, adapter_values=1000, seed=0)


def rows_of(draw: st.DataObject) -> list:
    """A run's rows as an engine writes them: rounds in order, some averaged, some skipped, some with a roll."""
    rows = [RUN]
    for round in range(1, draw.draw(st.integers(1, 5)) + 1):
        asked = draw.draw(st.sets(st.sampled_from(CLIENTS)))
        came = [client for client in sorted(asked) if draw.draw(st.booleans())]
        rows += [Transfer(round, client, "down", "change", 10) for client in sorted(asked)]
        for client in came:
            seconds = draw.draw(st.sampled_from([0.5, math.nan]))
            rows += [Training(round, client, 0.5 + round, 3, 10, seconds), Transfer(round, client, "up", "update", 7)]
        if draw.draw(st.booleans()):
            rows.append(Roll(round, tuple(came), {c: "away" for c in sorted(asked) if c not in came}, {}, 2))
        if came and draw.draw(st.booleans()):
            rows.append(Aggregation(round, {}, 0.25))
        if draw.draw(st.booleans()):
            rows += [Evaluation(round, domain, 0.1 * round, 1.0) for domain in ("x", "y")]
        rows += [Note(round, "words")] * draw.draw(st.integers(0, 4))
    return rows


def slow_answers(rows: list) -> dict[str, Answers]:
    """Who answered, from all rows at once."""
    closed = {row.round for row in rows if isinstance(row, Aggregation)}
    rolls = {row.round: row for row in rows if isinstance(row, Roll)}
    found: dict[str, Answers] = {}
    for round in sorted({row.round for row in rows if isinstance(row, Transfer | Roll)}):
        sent = [row for row in rows if isinstance(row, Transfer) and row.round == round]
        came = {row.client for row in sent if row.direction == "up"}
        asked = {row.client for row in sent}
        if round in rolls:
            came, asked = set(rolls[round].answered), {*rolls[round].answered, *rolls[round].failed}
        for client in asked | came:
            held = found.get(client, Answers())
            if client in came:
                found[client] = Answers(held.answered + 1, held.missed, round, 0)
            else:
                over = int(round in closed or round in rolls)
                found[client] = Answers(held.answered, held.missed + over, held.last, held.row + over)
    return found


@settings(max_examples=60)
@given(st.data())
def test_what_is_counted_as_rows_come_is_what_all_rows_say(data: st.DataObject):
    rows = rows_of(data)
    found, report = Progress.of(rows), summarise(rows)
    assert found.answers.counts() == count_answers(rows) == slow_answers(rows)
    assert {client: tuple(both) for client, both in found.sent.items()} == report.totals.by_client
    assert (found.bytes_up, found.bytes_down) == (report.totals.bytes_up, report.totals.bytes_down)
    assert found.losses == {client: held[-1] for client, held in report.losses.items()}
    assert found.notes == len(report.notes) and list(found.newest_notes) == list(report.notes[-6:])
    assert found.train_seconds == pytest.approx(report.train_seconds)
    assert [point.values for point in found.points] == [
        point.values for point in (report.points[:1] + report.points[1:][-1:])
    ]


def test_a_run_that_was_stopped_early_has_the_rounds_of_its_end():
    assert Progress.of([RUN, Choice(4, 2)]).run.num_rounds == 4 == summarise([RUN, Choice(4, 2)]).run.num_rounds
    assert Progress.of([RUN, Choice(4, 2), RUN]).run.num_rounds == 9, "it was given more rounds"


def test_status_reads_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Looked at after each round, and after the ledger was cut back."""
    taken = []
    take = Progress.take
    monkeypatch.setattr(Progress, "take", lambda self, row: (taken.append(row), take(self, row))[1])
    watched, path = WatchedRun(tmp_path), tmp_path / "ledger.jsonl"
    with ledgers.Ledger[ledgers.Taker](path) as held:
        held.append(RUN)
        for round in range(1, 31):
            held.append(Training(round, "ada", 0.5, 1, 1))
            held.append(Aggregation(round))
            held.sync()
            assert watched.look().rounds == round
        assert len(taken) == held.rows, "no row was read a second time"
        held.truncate_to(11)
        assert watched.look().rounds == 5
    assert watched.progress.done == summarise(read_rows(path)).training[-1].round


def test_a_ledger_that_is_cut_back_counts_anew(tmp_path: Path):
    with ledgers.Ledger(tmp_path / "ledger.jsonl", keeper=Progress) as held:
        for row in (RUN, Transfer(1, "ada", "up", "update", 5), Aggregation(1), Transfer(2, "ada", "up", "update", 5)):
            held.append(row)
        held.truncate_to(3)
        assert (held.kept.bytes_up, held.kept.done, held.bytes_up) == (5, 1, 5)
    with ledgers.Ledger(tmp_path / "ledger.jsonl", keeper=Progress) as held:
        assert held.kept.bytes_up == 5 and isinstance(held.kept.last, Aggregation)


def test_a_crowd_has_no_series_by_client():
    names = tuple(f"c{number}" for number in range(MOST_SITES + 1))
    crowd = RunRow(method="fedsrd", model="m", clients=names, num_rounds=1, adapter_values=1, seed=0)
    rows = [crowd, Transfer(1, "c1", "up", "update", 300), Training(1, "c1", 0.5, 3, 10), Aggregation(1)]
    text = prometheus_text(rows, "r", 1.0)
    assert "site=" not in text and 'direction="up"} 300' in text
    few = RunRow(method="fedsrd", model="m", clients=names[:-1], num_rounds=1, adapter_values=1, seed=0)
    assert 'site="c1",direction="up"} 300' in prometheus_text([few, *rows[1:]], "r", 1.0)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(render_progress(Progress.of(rows), judge_progress(Progress.of(rows), Writer(True), 1.0)))
    assert "901 more in the ledger" in console.export_text()


def test_long_runs_are_sampled_on_the_page():
    rows = [RUN]
    for round in range(1, 1001):
        rows += [Transfer(round, "ada", "up", "update", 300), Training(round, "ada", 0.5, 1, 1), Note(round, "n")]
        rows.append(Aggregation(round))
    rows.append(End(1000, "finished", "", 1.0))
    report = summarise(rows)
    text = write_update(page_of(Path("runs/x"), report, rows))
    few = rows[: 4 * MOST + 1]
    assert len(text) < 1.2 * len(write_update(page_of(Path("runs/x"), summarise(few), few))), "a fifth of the rounds"
    for words in ("rounds are shown, at even", "notes are shown, the newest", "points of a line are shown"):
        assert f"{MOST} of 1,000 {words}" in text
    assert len(sample(points_of(report, TRAINING_LOSS))) == MOST
    assert sample(range(1001))[0] == 0 and sample(range(1001))[-1] == 1000 and sample(range(MOST)) == range(MOST)


@given(st.lists(st.floats(0, 1).map(lambda x: 0.0 if x < 0.7 else x), min_size=1, max_size=9))
def test_the_live_view_needs_three_points_to_tell_which_measure_leads(matches: list[float]):
    view = EventKeeper(None)
    for round, match in enumerate(matches):
        view.round_finished(round, 9, {"x": Evaluation(round, "x", match, 1.0)}, 0, 0, 1.0)
    assert order_measures(view.telling) == order_measures(view.points) and len(view.telling) <= 3
