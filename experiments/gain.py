"""The share of dense FedIT's gain that is kept: the score of testbeds whose answers are free text.

A gain is the held-out loss of the base model, before the first round, less that at the end; the mean over domains, in
nats a token. A run that ends above its base has a negative gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.report.measures import BITS, LOSS
from fedloom.report.numbers import Report, interval


@dataclass(frozen=True, slots=True)
class Losses:
    """What runs end with: loss in nats a token, bits a byte (NaN where not measured), both means over seeds.

    half: half of the loss's 95 % interval; against: mean difference to dense FedIT on equal seeds, in nats a token, and
    half of its interval.
    """

    loss: float
    half: float
    bits: float
    against: float
    against_half: float


def gain(run: Report) -> float:
    """By how much the loss fell, in nats a token."""
    return LOSS.gain(run.value(LOSS.key, at=0), run.value(LOSS.key))


def paired(runs: Sequence[Report], dense: Sequence[Report]) -> list[tuple[Report, Report]]:
    """(run, dense run) of equal seeds."""
    by_seed = {report.run.seed: report for report in dense}
    return [(run, by_seed[run.run.seed]) for run in runs if run.run.seed in by_seed]


def share_kept(pairs: Sequence[tuple[Report, Report]]) -> tuple[float, float]:
    """(mean gain over mean dense gain, half of its 95 % interval), in per cent. NaN where dense FedIT gained nothing.

    The interval is that of a ratio of means on equal seeds: what is over of each gain, gain − share · dense gain, over
    the mean dense gain. What a seed does to both alike is not in it.
    """
    gains = [(gain(run), gain(dense)) for run, dense in pairs]
    whole = math.fsum(dense for _, dense in gains) / len(gains)
    if not whole > 0:
        return math.nan, math.nan
    share = math.fsum(own for own, _ in gains) / len(gains) / whole
    _, half = interval([own - share * dense for own, dense in gains])
    return 100 * share, 100 * half / whole


def losses(pairs: Sequence[tuple[Report, Report]]) -> Losses:
    """The losses behind a share."""
    ends = [run.value(LOSS.key) for run, _ in pairs]
    loss, half = interval(ends)
    bits, _ = interval([run.value(BITS.key) for run, _ in pairs])
    against, against_half = interval([end - dense.value(LOSS.key) for end, (_, dense) in zip(ends, pairs, strict=True)])
    return Losses(loss, half, bits, against, against_half)
