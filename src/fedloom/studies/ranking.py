"""Which of several settings is best: one rule, for whatever chooses.

1.  A setting is out if a run of it ended with a held-out loss that is no finite number, or with a higher one than it
    began with while exact match did not rise, or with the very same one, as where all training diverged.
2.  One measure decides for all: evaluation.metric. With "auto" that is exact match where the settings differ in it by
    more than chance explains, otherwise the held-out loss: so on free text, where exact match is 0 for all.
3.  Where two are equal in it, the lower loss is better, and then the fewer bytes.

Chance: the 95 % interval of the difference between two shares of the same N held-out examples, 1.96 √(2 p (1 − p) / N).
It takes the two runs for independent, which is careful: they answer the same examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fedloom.report.measures import EXACT_MATCH, LOSS, Measure, measure_named
from fedloom.report.numbers import Report

_Z_95 = 1.96


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting, by the name of its value or method, and its runs, one a seed."""

    value: str
    runs: tuple[Report, ...]

    def score(self, measure: Measure) -> float:
        """At the end, the mean over domains and seeds."""
        return fmean(report.value(measure.key) for report in self.runs)

    @property
    def bytes(self) -> float:
        """Of a run, both ways; the mean over seeds."""
        return fmean(report.totals.bytes for report in self.runs)

    @property
    def unfit(self) -> str:
        """Why it may not be chosen; empty if it may."""
        for report in self.runs:
            before, after = report.value(LOSS.key, at=0), report.value(LOSS.key)
            if not math.isfinite(after):
                return "its loss is no finite number at the end" if report.points else "it was not scored"
            if report.ended_worse and not report.value(EXACT_MATCH.key) > report.value(EXACT_MATCH.key, at=0):
                return f"it ended worse than it began, {LOSS.show(before)} → {LOSS.phrase(after)}"
            if len(report.points) > 1 and after == before:  # to the last bit: the model is the one that it began with
                return f"it learnt nothing, its loss is still {LOSS.phrase(after)}"
        return ""

    def rank(self, measure: Measure) -> tuple[float, float, float]:
        """Smaller is better: by the measure, then the loss, then bytes."""
        score = self.score(measure)
        return (-score if measure.higher else score), self.score(LOSS), self.bytes


def deciding_measure(by: str, found: Sequence[Candidate]) -> tuple[Measure, str]:
    """The measure that decides among all of these, and a sentence where it is not the one that would be expected."""
    if by != "auto":
        return measure_named(by), ""
    scores = [candidate.score(EXACT_MATCH) for candidate in found]
    spread = max(scores) - min(scores)
    examples = min(report.examples for candidate in found for report in candidate.runs)
    share = fmean(scores)
    chance = _Z_95 * math.sqrt(2 * share * (1 - share) / examples) if examples else 0.0
    if spread > chance:
        return EXACT_MATCH, ""
    if max(scores) == 0:
        return LOSS, "Exact match is 0 for all: the held-out loss decides."
    if spread == 0:
        return LOSS, f"Exact match is {EXACT_MATCH.phrase(scores[0])} for all: the held-out loss decides."
    return LOSS, (
        f"Exact match differs by {100 * spread:.1f} points at most, and chance explains {100 * chance:.1f} with "
        f"{examples} examples: a tie, so the held-out loss decides."
    )


def at_least(candidate: Candidate, target: float, measure: Measure) -> bool:
    """Whether its score is the target or better."""
    return measure.gain(target, candidate.score(measure)) >= 0
