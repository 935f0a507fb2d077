"""A run of another process, shown from its ledger: the same lines as the engine itself would have had shown."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedloom.errors import CheckpointError
from fedloom.records.configfile import load_config
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
    dump_row,
    read_rows,
)
from fedloom.records.session import End, Session
from fedloom.report.follow import LedgerFeed, LedgerTail, Replay
from fedloom.report.live import EventKeeper, LineView, LiveView
from toy import initial
from toy_run import simulation, toy_setup

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
RUN = RunRow(method="fedsrd", model="m", clients=("ada", "bob"), num_rounds=2, adapter_values=1000, seed=0)
FIRST = Session(0, "2026-11-01T00:00:00+00:00", "")
AGAIN = Session(1, "2026-11-02T00:00:00+00:00", "")
ROUND = [
    Presence(1, ("ada", "bob")),
    Training(1, "ada", 0.5, 3, 10),
    Transfer(1, "ada", "up", "update", 300),
    Training(1, "bob", 0.25, 3, 10),
    Transfer(1, "bob", "up", "update", 500),
    Roll(1, ("ada", "bob"), seconds=3.0),
    Aggregation(1, {}, 0.5),
]
NEXT = [
    Transfer(2, "ada", "down", "change", 100),
    Transfer(2, "bob", "down", "change", 100),
    Presence(2, ("ada",), {"bob": "is not connected"}),
    Note(2, "client bob: is not connected"),
]


class Lines:
    """A view for pipes and what it has printed."""

    def __init__(self, kind: type[EventKeeper] = LineView) -> None:
        self.console = Console(file=io.StringIO(), width=200)
        self.view = kind(self.console)

    @property
    def text(self) -> list[str]:
        return self.console.file.getvalue().splitlines()


def written(path: Path, *rows) -> Path:
    path.mkdir(exist_ok=True)
    with (path / "ledger.jsonl").open("ab") as file:
        file.writelines(dump_row(row) + b"\n" for row in rows)
    return path


def test_a_run_that_is_replayed_prints_what_the_engine_printed(tmp_path, no_picture):
    """The twin: the local engine's own events, against the rows that it wrote meanwhile."""
    overrides = ["federation.num_rounds=3", "federation.eval_every=0", "method.name=fedit", "federation.drop_out=0.3"]
    setup = toy_setup(load_config(TESTBED / "demo.toml", overrides), 3, initial())
    played, replayed = Lines(), Lines()
    with simulation(setup, tmp_path / "run", played.view) as run:
        run.play(resume=False)
    replay = Replay(replayed.view, tmp_path / "run")
    for row in read_rows(tmp_path / "run" / "ledger.jsonl"):
        replay.take(row)

    def bare(lines):  # without seconds, and without round 0, which was not scored
        return [line.rpartition("  ")[0] or line for line in lines if not line.startswith("round 0")]

    assert any("dropped out" in line for line in played.text), "otherwise this says less than it should"
    assert bare(replayed.text) == bare(played.text)


def test_rows_are_shown_as_they_are_written(tmp_path):
    lines = Lines()
    feed = LedgerFeed(lines.view, tmp_path / "run")
    feed.look()
    assert not feed.began and lines.text == []
    written(tmp_path / "run", RUN, FIRST, *ROUND)
    feed.look()
    assert feed.began and [line.split()[0] for line in lines.text] == ["fedsrd:"]
    written(tmp_path / "run", *NEXT)
    feed.look()
    assert lines.text[1:] == [
        "round 1/2  training loss 0.375  up 800 B, down 0 B  3.5 s",
        "missing: bob is not connected",
        "note, round 2: client bob: is not connected",
    ]
    written(tmp_path / "run", End(2, "failed", "too few"))
    feed.close()
    assert feed.end == End(2, "failed", "too few") and feed.round == 1
    assert len(lines.text) == 4, "a round within which a run ends is no round"


def test_half_a_line_waits_for_its_other_half(tmp_path):
    tail = LedgerTail(tmp_path / "ledger.jsonl")
    assert tail.read() == (False, [])
    line = dump_row(RUN) + b"\n"
    (tmp_path / "ledger.jsonl").write_bytes(line + line[:20])
    assert tail.read() == (False, [RUN]) and tail.read() == (False, [])
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(line[20:])
    assert tail.read() == (False, [RUN])
    (tmp_path / "ledger.jsonl").write_bytes(line)
    assert tail.read() == (True, [RUN]), "it was cut back"
    (tmp_path / "ledger.jsonl").unlink()
    assert tail.read() == (True, []) and tail.read() == (False, [])
    (tmp_path / "ledger.jsonl").write_bytes(b"{}\n")
    with pytest.raises(CheckpointError, match="no row of a ledger"):
        tail.read()


def test_a_broken_line_is_named_until_it_is_gone_and_hides_no_row(tmp_path):
    path = tmp_path / "ledger.jsonl"
    tail, line = LedgerTail(path), dump_row(RUN) + b"\n"
    path.write_bytes(line)
    assert tail.read() == (False, [RUN])
    path.write_bytes(line + line + b"{}\n" + line)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no row of a ledger: line 3"):
            tail.read()
    path.write_bytes(line + line + line)
    assert tail.read() == (False, [RUN, RUN])
    path.write_bytes(b"{}\n" + line)
    with pytest.raises(CheckpointError, match="line 1"):
        tail.read()
    path.write_bytes(line)
    assert tail.read() == (True, [RUN]), "another ledger, although its first line was broken at first"


def test_a_run_that_goes_on_is_shown_from_there(tmp_path):
    """Its ledger is cut back under the reader's eyes, and what it had before is not shown again."""
    run, lines = written(tmp_path / "run", RUN, FIRST, *ROUND, *NEXT, End(2, "failed", "too few")), Lines()
    feed = LedgerFeed(lines.view, run)
    feed.look()
    assert not feed.began and feed.end is None and lines.text == [], "the end before is not this one's"
    with Ledger(run / "ledger.jsonl") as ledger:
        ledger.truncate_to(2 + len(ROUND))
        ledger.append(AGAIN)
        feed.look()
        assert feed.began and feed.round == 1 and len(lines.text) == 1
        for row in NEXT:
            ledger.append(row)
    feed.look()
    assert lines.text[1:] == ["missing: bob is not connected", "note, round 2: client bob: is not connected"]


def test_the_live_view_marks_who_is_awaited_and_names_who_is_missing(tmp_path):
    lines = Lines(LiveView)
    feed = LedgerFeed(lines.view, written(tmp_path / "run"))
    written(tmp_path / "run", RUN, FIRST, ROUND[0])
    feed.look()
    assert lines.view.training == {"ada", "bob"}, "the first round sends them nothing"
    written(tmp_path / "run", *ROUND[1:3])
    feed.look()
    assert lines.view.training == {"bob"}
    written(tmp_path / "run", *ROUND[3:], *NEXT)
    feed.look()
    assert lines.view.training == {"ada", "bob"}
    lines.console.print(lines.view)
    text = "\n".join(lines.text)
    assert "▸ ada" in text and "round 2/2" in text and "missing: bob is not connected" in text


def test_scores_come_with_their_round(tmp_path):
    lines = Lines()
    feed = LedgerFeed(lines.view, written(tmp_path / "run"))
    written(tmp_path / "run", RUN, FIRST, Evaluation(0, "x", 0.25, 2.0), Evaluation(0, "y", 0.75, 2.0))
    feed.look()
    assert len(lines.text) == 1
    feed.look()
    assert lines.text[1].startswith("round 0/2") and "exact match 50.0 %" in lines.text[1]
