"""Score against bytes: what a variant came to under a budget, and how that compares.

A budget is a share of what dense fp32 FedIT sends, both ways, with the same attendance and at the testbed's largest
rank for all clients. All that is sent counts on both sides, missed broadcasts and the delivery of the result included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fedloom.report.numbers import MEAN, Report, interval

PUBLISHED = "published"
"""The budget of what papers set."""
TARGET = 0.8
"""The score that rounds and seconds are counted to."""
LINKS = ((1.0, 5.0), (10.0, 50.0), (100.0, 100.0))
"""Mbit/s up and down of a site's line."""
ROUND_TRIP = 0.08
"""Seconds there and back, once a message."""


@dataclass(frozen=True, slots=True)
class Point:
    """What a variant came to. share: of the bytes of dense fp32 FedIT of `rank`, both ways; up, down: bytes of a turn.

    score, half: mean over seeds and half of its 95 % interval, in percent; halfway: the mean score at half time.
    rounds: until the score is `TARGET`, the mean over seeds, NaN where a seed did not reach it; seconds: until then,
    at each of `LINKS`, all sites at once. client: bytes of one client over the whole run, both ways.
    """

    testbed: str
    budget: str
    variant: str
    seeds: int
    share: float
    up: float
    down: float
    halfway: float
    score: float
    half: float
    rounds: float
    seconds: tuple[float, ...]
    client: float
    rank: str

    @property
    def method(self) -> str:
        """The method's name."""
        return self.variant.partition(":")[0]

    @property
    def within(self) -> bool:
        """Whether what was sent is no more than the budget."""
        return self.budget == PUBLISHED or 100 * self.share <= float(self.budget.rstrip("%"))


@dataclass(frozen=True, slots=True)
class Reference:
    """The dense run that shares are of: its bytes, the mean over seeds, and its rank in words."""

    bytes: float
    rank: str


def measured(testbed: str, budget: str, variant: str, runs: Sequence[Report], reference: Reference) -> Point:
    """The point of some runs that differ in their seed."""
    turns, rounds = sum(run.turns for run in runs), fmean(rounds_to(run, TARGET) for run in runs)
    up, down = (sum(getattr(run.totals, f"bytes_{way}") for run in runs) / turns for way in ("up", "down"))
    score, half = interval([100 * run.score(MEAN) for run in runs])
    server_s = sum(run.server_seconds for run in runs) / sum(run.run.num_rounds for run in runs)
    busy_s = sum(run.train_seconds for run in runs) / turns + server_s
    sent = fmean(run.totals.bytes for run in runs)
    return Point(
        testbed=testbed,
        budget=budget,
        variant=variant,
        seeds=len(runs),
        share=sent / reference.bytes,
        up=up,
        down=down,
        halfway=100 * fmean(run.score_at(run.run.num_rounds // 2) for run in runs),
        score=score,
        half=half,
        rounds=rounds,
        seconds=tuple(rounds * (busy_s + line_seconds(up, down, link)) for link in LINKS),
        client=sent / len(runs[0].run.clients),
        rank=reference.rank,
    )


def rounds_to(report: Report, target: float) -> float:
    """The first evaluated round with this mean score; NaN where there was none."""
    return next((float(point.round) for point in report.points if point.scores[MEAN] >= target), math.nan)


def line_seconds(up: float, down: float, link: tuple[float, float]) -> float:
    """Seconds that so many bytes take on a line of (up, down) Mbit/s, one message each way."""
    return 2 * ROUND_TRIP + 8e-6 * (up / link[0] + down / link[1])


def above(points: Sequence[Point], own: str = "loom") -> list[Point]:
    """Points within their budget, of several seeds, whose interval lies above that of `own` there."""
    ours = {(point.testbed, point.budget): point.score + point.half for point in points if point.method == own}
    rivals = [point for point in points if point.method != own and point.within and point.seeds > 1]
    return [p for p in rivals if p.score - p.half > ours.get((p.testbed, p.budget), math.inf)]


def rows(points: Sequence[Point]) -> list[dict[str, str]]:
    """The points as a table of words."""
    return [_row(point) for point in points]


def figures(points: Sequence[Point]) -> list[dict[str, str]]:
    """The same with columns of plain numbers behind it, for programs: bytes of a client over a run, both ways and with
    the delivery; share of dense FedIT's bytes; score and the ends of its 95 % interval in per cent.
    """
    return [_row(point) | _numbers(point) for point in points]


def _numbers(point: Point) -> dict[str, str]:
    return {
        "method": point.method,
        "bytes_client": f"{point.client:.0f}",
        "share_of_dense": f"{point.share:.5f}",
        "score": f"{point.score:.1f}",
        "low": f"{max(point.score - point.half, 0):.1f}",
        "high": f"{min(point.score + point.half, 100):.1f}",
        "metric": "exact_match",
    }


def _row(point: Point) -> dict[str, str]:
    row = {
        "testbed": point.testbed,
        "budget": point.budget,
        "run": point.variant,
        "seeds": str(point.seeds),
        f"of dense fp32, {point.rank}": f"{100 * point.share:.2f} %{'' if point.within else ' (over)'}",
        "up B / turn": f"{point.up:.0f}",
        "down B / turn": f"{point.down:.0f}",
        "halfway %": f"{point.halfway:.1f}",
        "end %": f"{point.score:.1f}{f' ± {point.half:.1f}' if point.seeds > 1 else ''}",
        f"rounds to {100 * TARGET:.0f} %": _number(point.rounds),
    }
    names = [f"s at {up:g}/{down:g} Mbit/s" for up, down in LINKS]
    return row | {name: _number(seconds) for name, seconds in zip(names, point.seconds, strict=True)}


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"
