"""What a run is scored by: exact match, held-out loss, bits a byte, and what evaluation.metrics adds.

One rule orders them everywhere. Exact match leads where it is above 0 anywhere. Where it is 0 throughout, as on free
text, it says nothing, and the loss leads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedloom.report.numbers import MEAN, Point, Report


@dataclass(frozen=True, slots=True)
class Measure:
    """One way to score a model. key: its name in the ledger and in `Point.values`; factor and digits: how it is shown.

    higher: whether more is better.
    """

    key: str
    name: str
    unit: str
    higher: bool
    factor: float = 1.0
    digits: int = 3

    @property
    def title(self) -> str:
        """Name and unit, such as "exact match (%)"."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def show(self, value: float, sign: str = "") -> str:
        """The value as it stands in tables; sign: "+" shows one always. What is not a finite number is a dash."""
        return f"{self.factor * value:{sign}.{self.digits}f}" if math.isfinite(value) else "–"

    def phrase(self, value: float) -> str:
        """The value with its unit, for running text: "12.5 %", "4.74 nats a token"."""
        return f"{self.show(value)} {self.unit}".strip()

    def gain(self, before: float, after: float) -> float:
        """By how much `after` is better; negative where it is worse."""
        return after - before if self.higher else before - after


def fraction(key: str, name: str | None = None) -> Measure:
    """A measure from 0 to 1 of which more is better, shown in percent."""
    return Measure(key, name or key, "%", higher=True, factor=100.0, digits=1)


EXACT_MATCH = fraction("exact_match", "exact match")
LOSS = Measure("loss", "loss", "nats a token", higher=False)
BITS = Measure("bits_per_byte", "bits a byte", "", higher=False)
TRAINING_LOSS = Measure("training_loss", "training loss", "nats a token", higher=False)
_KNOWN = {measure.key: measure for measure in (EXACT_MATCH, LOSS, BITS)}


def measure_named(key: str) -> Measure:
    """The measure of that name; one of the user's is a fraction."""
    return _KNOWN.get(key) or fraction(key)


def list_measures(reports: Iterable[Report]) -> list[Measure]:
    """What was measured in any of the runs, the leading one first; empty where nothing was held out."""
    return order_measures([point for report in reports for point in report.points])


def order_measures(points: Sequence[Point]) -> list[Measure]:
    """What was measured at any of the points, the leading one first."""
    found = dict.fromkeys(key for point in points for key in point.values)
    if not found:
        return []
    own = [fraction(key) for key in found if key not in _KNOWN]
    bits = [BITS] if BITS.key in found else []
    if exact_match_moves(points):
        return [EXACT_MATCH, LOSS, *bits, *own]
    return [LOSS, *bits, *own, EXACT_MATCH]


def exact_match_moves(points: Iterable[Point]) -> bool:
    """Whether it is above 0 anywhere."""
    return any(value > 0 for point in points for value in point.scores.values())


def list_pictured(reports: Iterable[Report]) -> list[Measure]:
    """The measures that a picture has a row for: none that is 0 throughout, and bits not beside nats."""
    points = [point for report in reports for point in report.points]
    hidden = {BITS} if exact_match_moves(points) else {BITS, EXACT_MATCH}
    return [measure for measure in order_measures(points) if measure not in hidden]


def phrase_scores(points: Sequence[Point]) -> list[str]:
    """Every measure's mean at the last point, and at the first, in words; the leading one first."""
    if not points:
        return []
    first, last = points[0], points[-1]
    return [
        f"{measure.name} {measure.phrase(_mean(last, measure))} (at first {measure.phrase(_mean(first, measure))})"
        for measure in order_measures([first, last])
    ]


def _mean(point: Point, measure: Measure) -> float:
    return point.values.get(measure.key, {}).get(MEAN, math.nan)
