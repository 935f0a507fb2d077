"""`fedloom status`: how a run stands, from its folder alone; it may run in another process, or have ended long ago."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedloom.errors import CheckpointError
from fedloom.records.ledger import Aggregation, Roll, Row, read_rows
from fedloom.records.text import LONG, cell
from fedloom.report.answers import Answers, count_answers
from fedloom.report.measures import phrase_scores
from fedloom.report.numbers import Report, human_bytes, summarise

LOOK_SECONDS = 1.0
NOTES = 6
"""How many of the newest notes are shown."""


def render_folder(folder: Path) -> RenderableType:
    """The run as it stands. Raises CheckpointError where the folder holds none."""
    path = folder / "ledger.jsonl"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected the folder of a run that has begun")
    return render_rows(read_rows(path), time.time() - path.stat().st_mtime)


def follow_run(folder: Path, console: Console) -> None:
    """Show the run until its last round is done; once only where nobody watches."""
    if not console.is_terminal:
        console.print(render_folder(folder))
        return
    with Live(render_folder(folder), console=console, refresh_per_second=2) as live:
        while not is_finished(read_rows(folder / "ledger.jsonl")):
            time.sleep(LOOK_SECONDS)
            live.update(render_folder(folder))
        live.update(render_folder(folder))


def is_finished(rows: Sequence[Row]) -> bool:
    """Whether the run has ended, in one way or another; where its ledger does not say: whether all rounds are over."""
    return summarise(rows).facts.end is not None or last_round(rows) >= summarise(rows).run.num_rounds


def last_round(rows: Sequence[Row]) -> int:
    """The last round that has been aggregated; 0 before the first."""
    return max((row.round for row in rows if isinstance(row, Aggregation)), default=0)


def render_rows(rows: Sequence[Row], quiet: float) -> RenderableType:
    """Rounds, clients, scores and the newest notes. quiet: seconds since the ledger grew."""
    report, tallies, last = summarise(rows), count_answers(rows), last_round(rows)
    run = report.run
    bar = Table.grid(padding=(0, 1))
    end = report.facts.end
    state = f"last row {quiet:.0f} s ago"
    if end is not None:
        state = ": ".join(filter(None, (end.status, end.reason)))
    elif last >= run.num_rounds:
        state = "finished"
    bar.add_row(f"round {last}/{run.num_rounds}", ProgressBar(run.num_rounds, last, 32), cell(state, limit=LONG))
    head = cell(f"{run.method}: {len(run.clients)} clients, {run.adapter_values:,} values", "bold")
    return Group(head, bar, _clients(report, tallies), *_closing(report), *_roll(rows))


def _clients(report: Report, tallies: dict[str, Answers]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("client")
    for name in ("answered", "missed", "last round", "loss", "up", "down"):
        table.add_column(name, justify="right")
    for client in report.run.clients:
        tally, losses = tallies.get(client, Answers()), report.losses.get(client, ())
        up, down = report.totals.by_client.get(client, (0, 0))
        loss = f"{losses[-1]:.3f}" if losses and losses[-1] == losses[-1] else "–"
        counts = [str(tally.answered), str(tally.missed), str(tally.last or "–")]
        style = "yellow" if tally.missed else ""
        table.add_row(cell(client), *counts, loss, human_bytes(up), human_bytes(down), style=style)
    sums = report.totals
    table.add_row("all", "", "", "", "", human_bytes(sums.bytes_up), human_bytes(sums.bytes_down), style="bold")
    return table


def _closing(report: Report) -> list[Text]:
    said = []
    if report.points:
        said.append(cell(";  ".join(phrase_scores(report.points)), limit=LONG))
    return said + [cell(f"round {note.round}: {note.text}", "yellow", LONG) for note in report.notes[-NOTES:]]


def _roll(rows: Sequence[Row]) -> list[Text]:
    """Who is missing from the newest roll."""
    roll = next((row for row in reversed(rows) if isinstance(row, Roll)), None)
    if roll is None or not (roll.failed or roll.late):
        return []
    missing = ", ".join(sorted({*roll.failed, *roll.late}))
    return [cell(f"round {roll.round}, after {roll.tries} tries: without {missing}", "yellow", LONG)]
