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

from fedloom.records.ledger import Roll, Row
from fedloom.records.text import LONG, cell
from fedloom.report.answers import Answers, count_answers, find_awaited, find_presence
from fedloom.report.measures import phrase_scores
from fedloom.report.numbers import Report, human_bytes, summarise
from fedloom.report.standing import Standing, read_run
from fedloom.report.tables import region_sentence

LOOK_SECONDS = 1.0
NOTES = 6
"""How many of the newest notes are shown."""


def show_run(folder: Path, console: Console, follow: bool = True) -> Standing:
    """Show how the run stands, and with `follow` go on until it is over, where somebody watches.

    Raises CheckpointError where the folder holds no run.
    """
    rows, standing = read_run(folder)
    if follow and console.is_terminal:
        standing = _follow(folder, console, rows, standing)
    else:
        console.print(render_rows(rows, standing))
    if standing.again:  # in one line, however long it is, so that it can be copied
        console.print(cell(f"go on with: {standing.again}", limit=LONG), soft_wrap=True)
    return standing


def _follow(folder: Path, console: Console, rows: Sequence[Row], standing: Standing) -> Standing:
    with Live(render_rows(rows, standing), console=console, refresh_per_second=2) as live:
        while not standing.is_over:
            time.sleep(LOOK_SECONDS)
            rows, standing = read_run(folder)
            live.update(render_rows(rows, standing))
    return standing


def render_rows(rows: Sequence[Row], standing: Standing) -> RenderableType:
    """Rounds, clients, scores, the newest notes, and who is waited for."""
    report, tallies = summarise(rows), count_answers(rows)
    run = report.run
    bar = Table.grid(padding=(0, 1))
    done = f"round {standing.rounds}/{run.num_rounds}"
    bar.add_row(done, ProgressBar(run.num_rounds, standing.rounds, 32), cell(standing.describe(), limit=LONG))
    head = cell(f"{run.method}: {len(run.clients)} clients, {run.adapter_values:,} values", "bold")
    parts: list[RenderableType] = [head, bar, _clients(report, tallies), *_closing(report), *_roll(rows)]
    if not standing.is_over:
        parts += _waiting(rows)
    return Group(*parts)


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
    said = [cell(text, limit=LONG) for text in (region_sentence(report),) if text]
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


def _waiting(rows: Sequence[Row]) -> list[Text]:
    """Who is waited for, and who cannot be asked and why."""
    missing = [f"{site} {reason}" for site, reason in sorted(find_presence(rows).items()) if reason]
    awaited = find_awaited(rows)
    said = [cell(f"waiting for {', '.join(awaited)}", limit=LONG)] if awaited else []
    return [*said, cell(f"missing: {'; '.join(missing)}", "yellow", LONG)] if missing else said
