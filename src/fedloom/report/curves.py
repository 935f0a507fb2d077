"""What a measure did over the rounds of one run, and on the mean of several that differ in their seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.report.measures import TRAINING_LOSS, Measure
from fedloom.report.numbers import MEAN, Point, Report, interval


@dataclass(frozen=True, slots=True)
class Stretch:
    """Several runs after one round: the mean of a measure and half its 95 % interval, the mean of the bytes sent."""

    round: int
    bytes: float
    mean: float
    half: float


def points_of(report: Report, measure: Measure) -> Sequence[Point]:
    """The points of a run at which the measure was taken."""
    return report.training if measure == TRAINING_LOSS else report.points


def shown_value(point: Point, measure: Measure, domain: str) -> float:
    """The value in the measure's own units; NaN, which leaves a gap, where it was not taken or is infinite."""
    value = measure.factor * point.values.get(measure.key, {}).get(domain, math.nan)
    return value if math.isfinite(value) else math.nan


def over_seeds(reports: Sequence[Report], measure: Measure) -> list[Stretch]:
    """One stretch for each round of which all runs have a value."""
    by_round = [{point.round: point for point in points_of(report, measure)} for report in reports]
    stretches = []
    for round in sorted(set.intersection(*(set(points) for points in by_round))):
        sent = sum(points[round].bytes for points in by_round) / len(by_round)
        mean, half = interval([shown_value(points[round], measure, MEAN) for points in by_round])
        stretches.append(Stretch(round, sent, mean, half))
    return stretches
