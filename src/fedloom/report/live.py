"""What a person sees while a run goes on: a live view on a terminal, otherwise one plain line a round."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedloom.records.events import RunFacts, RunSummary, Scores
from fedloom.records.text import LONG, cell
from fedloom.report.measures import exact_match_moves, order_measures, phrase_scores
from fedloom.report.numbers import MEAN, Point, human_bytes, values_of

LOADING = "loading model and data …"


@contextmanager
def watch(console: Console, loading: str = LOADING) -> Iterator[EventKeeper]:
    """An observer that shows the run on this console for as long as the context lasts.

    loading: what a terminal shows until it is known what the run is.
    """
    if not console.is_terminal:
        yield LineView(console)
        return
    view = LiveView(console, loading=loading)
    with Live(view, console=console, refresh_per_second=5, transient=True):
        yield view


NOTES = 3
"""Notes of one round that are shown; all of them are in the ledger and the report."""


@dataclass(slots=True)
class Tally:
    """One client so far: its last loss, the bytes it has sent and received, its turns."""

    loss: float | None = None
    up: int = 0
    down: int = 0
    turns: int = 0


@dataclass(slots=True)
class EventKeeper:
    """An observer that keeps the events, for both views to show. console: where lines go that stay.

    training: the clients whose turn it is. away: site that cannot be asked → why.
    """

    console: Console | None = None
    loading: str = LOADING
    facts: RunFacts | None = None
    round: int = 0
    training: set[str] = field(default_factory=set)
    away: Mapping[str, str] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    moved: Point | None = None
    seconds: list[float] = field(default_factory=list)
    round_began: float = 0.0
    notes: list[str] = field(default_factory=list)

    def run_started(self, facts: RunFacts) -> None:
        """Say what the run is, and remember it."""
        self.facts = facts
        self.round = facts.first_round - 1
        self.tallies = {client: Tally() for client in facts.clients}
        self.say(f"{_headline(facts)}, in {facts.out}", "bold")
        for text in facts.warnings:
            self.say(f"note: {text}", "yellow")

    def client_started(self, round: int, client: str) -> None:
        """Remember whose turn it is."""
        if round != self.round:
            self.round, self.losses, self.round_began = round, [], time.monotonic()
            self.training.clear()
        if self.facts is None or not self.facts.together:
            self.training.clear()
        self.training.add(client)

    def client_finished(self, round: int, client: str, loss: float, bytes_up: int, bytes_down: int) -> None:
        """Add up."""
        tally = self.tallies.setdefault(client, Tally())
        tally.loss, tally.turns = loss, tally.turns + 1
        tally.up, tally.down = tally.up + bytes_up, tally.down + bytes_down
        self.losses.append(loss)
        self.training.discard(client)

    def noted(self, round: int, text: str) -> None:
        """Say it, or count it where a round has many."""
        if not round:
            self.say(f"note: {text}", "yellow")
            return
        self.notes.append(text)
        if len(self.notes) <= NOTES:
            self.say(f"note, round {round}: {text}", "yellow")

    def round_finished(
        self, round: int, num_rounds: int, scores: Scores | None, bytes_up: int, bytes_down: int, seconds: float
    ) -> None:
        """Remember the scores; round 0 is the evaluation before the first round."""
        self.round = round
        self.training.clear()
        if len(self.notes) > NOTES:
            self.say(f"… and {len(self.notes) - NOTES} more notes on round {round} in the ledger", "yellow")
        self.notes = []
        if scores:
            self.points.append(Point(round, values_of(scores), bytes_up + bytes_down))
            if self.moved is None and exact_match_moves(self.points[-1:]):
                self.moved = self.points[-1]
        if round:
            self.seconds.append(seconds)

    def sites_seen(self, missing: Mapping[str, str]) -> None:
        """Remember who cannot be asked, and why."""
        self.away = missing

    def run_finished(self, summary: RunSummary) -> None:
        """The closing tables say the rest."""

    def say(self, text: str, style: str = "") -> None:
        """A line that stays: above the live view, or in a pipe without colours."""
        if self.console is not None:
            line = cell(text, style if self.console.is_terminal else "", LONG)
            self.console.print(line, highlight=False, soft_wrap=True)

    @property
    def telling(self) -> list[Point]:
        """Points that say which measure leads: the first, the first at which exact match was above 0, the newest."""
        return [point for point in (*self.points[:1], self.moved, *self.points[-1:]) if point is not None]


class LineView(EventKeeper):
    """A line at the start and one a round, for logs and pipes."""

    def sites_seen(self, missing: Mapping[str, str]) -> None:
        """Say it, where it has changed."""
        if missing != self.away:
            self.say(_absent(missing) or "all sites are there")
        super().sites_seen(missing)

    def round_finished(
        self, round: int, num_rounds: int, scores: Scores | None, bytes_up: int, bytes_down: int, seconds: float
    ) -> None:
        """Say what the round brought."""
        super().round_finished(round, num_rounds, scores, bytes_up, bytes_down, seconds)
        parts = [f"round {round}/{num_rounds}"]
        known = [loss for loss in self.losses if not math.isnan(loss)]  # some sites keep theirs to themselves
        if known and round:
            parts.append(f"training loss {sum(known) / len(known):.3f}")
        parts.append(f"up {human_bytes(bytes_up)}, down {human_bytes(bytes_down)}")
        if scores:
            now = self.points[-1].values
            parts += [f"{m.name} {m.phrase(now[m.key][MEAN])}" for m in order_measures(self.telling)]
        self.say("  ".join([*parts, f"{seconds:.1f} s"]), "")


class LiveView(EventKeeper):
    """The live view; rich asks for it anew several times a second. What the run is and notes stay above it."""

    def __rich__(self) -> RenderableType:
        """The view as it stands."""
        if self.facts is None:
            return cell(self.loading, "dim", LONG)
        return Group(self._bar(self.facts), self._clients(), *self._absent(), self._score())

    def _bar(self, facts: RunFacts) -> Table:
        done = len(self.seconds) + facts.first_round - 1
        line = Table.grid(padding=(0, 1))
        line.add_row(
            f"round {self.round}/{facts.num_rounds}", ProgressBar(facts.num_rounds, done, 32), self._left(done)
        )
        return line

    def _left(self, done: int) -> str:
        if self.facts is None or not self.seconds:
            return ""
        mean = sum(self.seconds) / len(self.seconds)
        under_way = min(time.monotonic() - self.round_began, mean) if self.round > done else 0.0
        left = max(0, round(mean * (self.facts.num_rounds - done) - under_way))
        return f"{left // 60}:{left % 60:02d} left"

    def _clients(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("client")
        for name in ("loss", "up so far", "down so far"):
            table.add_column(name, justify="right")
        shown = sorted(self.tallies, key=lambda name: (name not in self.training, -self.tallies[name].turns, name))[
            :12
        ]  # as many as fit a small terminal
        for name in sorted(shown):
            tally = self.tallies[name]
            loss = "–" if tally.loss is None or math.isnan(tally.loss) else f"{tally.loss:.3f}"
            now = name in self.training
            mark = f"▸ {name}" if now else f"  {name}"
            table.add_row(cell(mark), loss, human_bytes(tally.up), human_bytes(tally.down), style="cyan" if now else "")
        up, down = (sum(getattr(t, way) for t in self.tallies.values()) for way in ("up", "down"))
        table.add_row("  all", "", human_bytes(up), human_bytes(down), style="bold")
        return table

    def _absent(self) -> list[Text]:
        """Who cannot be asked, and why."""
        return [cell(_absent(self.away), "yellow", LONG)] if self.away else []

    def _score(self) -> RenderableType:
        if not self.points:
            return Text("")
        lead, now = order_measures(self.telling)[0], self.points[-1].values
        domains = [(domain, value) for domain, value in sorted(now[lead.key].items()) if domain != MEAN]
        by_domain = f"{lead.name}: " + "   ".join(f"{domain} {lead.show(value)}" for domain, value in domains)
        return Group(*(cell(text, limit=LONG) for text in [*phrase_scores(self.points), by_domain]))


def _absent(missing: Mapping[str, str]) -> str:
    return f"missing: {'; '.join(f'{site} {why}' for site, why in sorted(missing.items()))}" if missing else ""


def _headline(facts: RunFacts) -> str:
    rounds = "1 round" if facts.num_rounds == 1 else f"{facts.num_rounds} rounds"
    return f"{facts.method}: {len(facts.clients)} clients, {rounds}, {facts.adapter_values:,} values"
