"""`fedloom status`: how a run stands, from its folder alone; it may run in another process, or have ended long ago."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedloom.records.ledger import Roll, Row
from fedloom.records.text import LONG, cell
from fedloom.report.answers import Answers
from fedloom.report.follow import LedgerTail
from fedloom.report.measures import phrase_scores
from fedloom.report.numbers import human_bytes
from fedloom.report.progress import Progress
from fedloom.report.standing import Standing, judge_progress, look_at, resume_command
from fedloom.report.tables import region_sentence

LOOK_SECONDS = 1.0
MOST_SHOWN = 100
"""Clients that are listed, the first by name: more than any screen has lines."""


def show_run(folder: Path, console: Console, follow: bool = True) -> Standing:
    """Show how the run stands, and with `follow` go on until it is over, where somebody watches.

    Raises CheckpointError where the folder holds no run.
    """
    watched = WatchedRun(folder)
    standing = watched.look()
    if follow and console.is_terminal:
        standing = _follow(watched, console, standing)
    else:
        console.print(render_progress(watched.progress, standing))
    if standing.again:  # in one line, however long it is, so that it can be copied
        console.print(cell(f"go on with: {standing.again}", limit=LONG), soft_wrap=True)
    return standing


class WatchedRun:
    """A run that is looked at again and again: of its ledger only the rows that are new are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.progress = Progress()
        self._tail = LedgerTail(folder / "ledger.jsonl")

    def look(self) -> Standing:
        """How it stands now. Raises CheckpointError where the folder holds no run."""
        writer, quiet = look_at(self.folder)
        again, rows = self._tail.read()
        if again:  # the run was cut back to its checkpoint, or another takes its place
            self.progress = Progress()
        for row in rows:
            self.progress.take(row)
        return judge_progress(self.progress, writer, quiet, resume_command(self.folder))


def _follow(watched: WatchedRun, console: Console, standing: Standing) -> Standing:
    with Live(render_progress(watched.progress, standing), console=console, refresh_per_second=2) as live:
        while not standing.is_over:
            time.sleep(LOOK_SECONDS)
            standing = watched.look()
            live.update(render_progress(watched.progress, standing))
    return standing


def render_rows(rows: Iterable[Row], standing: Standing) -> RenderableType:
    """`render_progress` from all rows of a run."""
    return render_progress(Progress.of(rows), standing)


def render_progress(progress: Progress, standing: Standing) -> RenderableType:
    """Rounds, clients, scores, the newest notes, and who is waited for."""
    run = progress.run
    bar = Table.grid(padding=(0, 1))
    done = f"round {standing.rounds}/{run.num_rounds}"
    bar.add_row(done, ProgressBar(run.num_rounds, standing.rounds, 32), cell(standing.describe(), limit=LONG))
    head = cell(f"{run.method}: {len(run.clients)} clients, {run.adapter_values:,} values", "bold")
    parts: list[RenderableType] = [head, bar, _clients(progress), *_closing(progress), *_roll(progress.roll)]
    if not standing.is_over:
        parts += _waiting(progress)
    return Group(*parts)


def _clients(progress: Progress) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("client")
    for name in ("answered", "missed", "last round", "loss", "up", "down"):
        table.add_column(name, justify="right")
    tallies, clients = progress.answers.counts(), progress.run.clients
    for client in clients[:MOST_SHOWN]:
        tally, loss = tallies.get(client, Answers()), progress.losses.get(client, math.nan)
        up, down = progress.sent.get(client, (0, 0))
        shown = "–" if math.isnan(loss) else f"{loss:.3f}"
        counts = [str(tally.answered), str(tally.missed), str(tally.last or "–")]
        style = "yellow" if tally.missed else ""
        table.add_row(cell(client), *counts, shown, human_bytes(up), human_bytes(down), style=style)
    if len(clients) > MOST_SHOWN:
        table.add_row(f"… and {len(clients) - MOST_SHOWN:,} more in the ledger")
    sums = human_bytes(progress.bytes_up), human_bytes(progress.bytes_down)
    table.add_row("all", "", "", "", "", *sums, style="bold")
    return table


def _closing(progress: Progress) -> list[Text]:
    said = [cell(text, limit=LONG) for text in (region_sentence(progress.relayed),) if text]
    if progress.points:
        said.append(cell(";  ".join(phrase_scores(progress.points)), limit=LONG))
    return said + [cell(f"round {note.round}: {note.text}", "yellow", LONG) for note in progress.newest_notes]


def _roll(roll: Roll | None) -> list[Text]:
    """Who is missing from the newest roll."""
    if roll is None or not (roll.failed or roll.late):
        return []
    missing = ", ".join(sorted({*roll.failed, *roll.late}))
    return [cell(f"round {roll.round}, after {roll.tries} tries: without {missing}", "yellow", LONG)]


def _waiting(progress: Progress) -> list[Text]:
    """Who is waited for, and who cannot be asked and why."""
    missing = [f"{site} {reason}" for site, reason in sorted(progress.online.items()) if reason]
    awaited = progress.awaited.clients()
    more = f" and {len(awaited) - MOST_SHOWN:,} more" if len(awaited) > MOST_SHOWN else ""
    said = [cell(f"waiting for {', '.join(awaited[:MOST_SHOWN])}{more}", limit=LONG)] if awaited else []
    return [*said, cell(f"missing: {'; '.join(missing)}", "yellow", LONG)] if missing else said
