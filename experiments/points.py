"""Score against bytes: what a variant came to under a budget, and how that compares.

A budget is a share of what dense fp32 FedIT sends, both ways, with the same attendance and at the testbed's largest
rank for all clients. All that is sent counts on both sides, missed broadcasts and the delivery of the result included.

A score is exact match, or for free text the share of dense FedIT's gain that is kept (`gain`); both in per cent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from experiments.gain import Losses, losses, paired, share_kept
from experiments.work import Work, measure_seconds
from fedloom.report.numbers import MEAN, Report, interval

EXACT_MATCH, SHARE_OF_GAIN = "exact_match", "share_of_gain"
"""What a testbed is scored by."""
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
    at each of `LINKS`, all sites at once. client: bytes of one client over the whole run, both ways. losses: for free
    text, what is behind the score; then no score is taken on the way. work: what a client's part in it takes.
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
    losses: Losses | None = None
    work: Work = Work()

    @property
    def metric(self) -> str:
        """What the score is."""
        return SHARE_OF_GAIN if self.losses else EXACT_MATCH

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
    """The dense run that shares are of: its bytes, the mean over seeds, and its rank in words.

    dense: for free text, the runs of dense FedIT at its best rate, whose gain is the whole.
    """

    bytes: float
    rank: str
    dense: tuple[Report, ...] = ()


def measured(testbed: str, budget: str, variant: str, runs: Sequence[Report], reference: Reference) -> Point:
    """The point of some runs that differ in their seed; for free text, each seed must be one of the dense runs'."""
    pairs = paired(runs, reference.dense)
    turns = sum(run.turns for run in runs)
    rounds = math.nan if pairs else fmean(rounds_to(run, TARGET) for run in runs)
    up, down = (sum(getattr(run.totals, f"bytes_{way}") for run in runs) / turns for way in ("up", "down"))
    score, half = share_kept(pairs) if pairs else interval([100 * run.score(MEAN) for run in runs])
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
        halfway=math.nan if pairs else 100 * fmean(run.score_at(run.run.num_rounds // 2) for run in runs),
        score=score,
        half=half,
        rounds=rounds,
        seconds=tuple(rounds * (busy_s + line_seconds(up, down, link)) for link in LINKS),
        client=sent / len(runs[0].run.clients),
        rank=reference.rank,
        losses=losses(pairs) if pairs else None,
        work=Work(
            seconds=measure_seconds(runs),
            walls=tuple(runs[0].run.num_rounds * (busy_s + line_seconds(up, down, link)) for link in LINKS),
        ),
    )


def rounds_to(report: Report, target: float) -> float:
    """The first evaluated round with this mean score; NaN where there was none."""
    return next((float(point.round) for point in report.points if point.scores[MEAN] >= target), math.nan)


def line_seconds(up: float, down: float, link: tuple[float, float]) -> float:
    """Seconds that so many bytes take on a line of (up, down) Mbit/s, one message each way."""
    return 2 * ROUND_TRIP + 8e-6 * (up / link[0] + down / link[1])


def best_at_each_budget(points: Sequence[Point]) -> list[Point]:
    """Of a method's points at one budget the one of highest score, and all that papers set, in their order."""
    best: dict[tuple[str, str], float] = {}
    for p in points:
        best[p.method, p.budget] = max(best.get((p.method, p.budget), -math.inf), p.score)
    return [p for p in points if p.budget == PUBLISHED or not p.score < best[p.method, p.budget]]


def above(points: Sequence[Point], own: str = "loom") -> list[Point]:
    """Points within their budget, of several seeds, whose interval lies above that of `own` there."""
    ours = {(point.testbed, point.budget): point.score + point.half for point in points if point.method == own}
    rivals = [point for point in points if point.method != own and point.within and point.seeds > 1]
    return [p for p in rivals if p.score - p.half > ours.get((p.testbed, p.budget), math.inf)]
