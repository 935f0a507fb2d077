"""The figures of a run, and of several runs that differ in their seed only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from fedloom.errors import CheckpointError
from fedloom.records.ledger import Aggregation, Evaluation, Note, Row, RunRow, Totals, Training, totals
from fedloom.report.baseline import Baseline, delivered_bytes, play_ledger

MEAN = "mean"
"""The name under which the mean over domains stands beside them."""

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
_Z_95 = 1.96


@dataclass(frozen=True, slots=True)
class Point:
    """The global model after a round: exact match and loss by domain (and their mean), bytes sent so far, both ways."""

    round: int
    scores: Mapping[str, float]
    bytes: int
    losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """One run. `points` are the evaluated rounds; `losses` holds each client's training losses, in order.

    `train_seconds` and `server_seconds` are sums over all turns and over all rounds. own_baseline: dense FedIT at the
    run's own largest ranks; unit_baseline: at rank 1, by which every other rank follows. delivered: client → bytes of
    the result, sent when all rounds were over.
    """

    run: RunRow
    points: tuple[Point, ...]
    totals: Totals
    losses: Mapping[str, Sequence[float]]
    notes: tuple[Note, ...]
    own_baseline: Baseline
    unit_baseline: Baseline
    delivered: Mapping[str, int]
    train_seconds: float = 0.0
    server_seconds: float = 0.0

    @property
    def domains(self) -> list[str]:
        """The domains that were evaluated, sorted."""
        return sorted({domain for point in self.points for domain in point.scores} - {MEAN})

    @property
    def turns(self) -> int:
        """How often a client trained."""
        return sum(len(losses) for losses in self.losses.values())

    @property
    def baseline(self) -> Baseline:
        """What dense fp32 FedIT would have sent in this run's place, at the rank that the run names."""
        return self.baseline_at(self.run.baseline_r)

    def baseline_at(self, rank: int | None) -> Baseline:
        """The same at another rank; None for the run's own largest ranks. An older ledger knows only those."""
        return self.unit_baseline.times(rank) if rank and self.unit_baseline.ranks else self.own_baseline

    @property
    def dense_bytes(self) -> int:
        """Bytes of `baseline`, both ways, the delivery of the result included."""
        return self.baseline.bytes

    def score_at(self, round: int) -> float:
        """Mean exact match at the last evaluation up to a round; NaN where there was none."""
        scores = [point.scores[MEAN] for point in self.points if point.round <= round]
        return scores[-1] if scores else math.nan

    def score(self, domain: str, at: int = -1) -> float:
        """Exact match at the first (0) or last (-1) evaluation; NaN where there was none."""
        return self.points[at].scores.get(domain, math.nan) if self.points else math.nan


def summarise(rows: Sequence[Row], origin: str = "the ledger") -> Report:
    """The report of one ledger's rows. Raises CheckpointError where the row that says what the run is, is missing."""
    run = next((row for row in rows if isinstance(row, RunRow)), None)
    if run is None:
        raise CheckpointError(f"{origin} records no run: its first row is missing")
    sums = totals(rows)
    rounds = range(max([0, *sums.by_round, *(row.round for row in rows if isinstance(row, Evaluation))]) + 1)
    sent = list(accumulate(sum(sums.by_round.get(round, (0, 0))) for round in rounds))
    scores: dict[int, dict[str, float]] = {}
    heldout: dict[int, dict[str, float]] = {}
    losses: dict[str, list[float]] = {}
    for row in rows:
        if isinstance(row, Evaluation):
            scores.setdefault(row.round, {})[row.domain] = row.exact_match
            heldout.setdefault(row.round, {})[row.domain] = row.loss
        elif isinstance(row, Training):
            losses.setdefault(row.client, []).append(row.loss)
    points = [
        Point(round, _with_mean(found), sent[round], _with_mean(heldout[round]))
        for round, found in sorted(scores.items())
    ]
    return Report(
        run=run,
        points=tuple(points),
        totals=sums,
        losses=dict(sorted(losses.items())),
        notes=tuple(row for row in rows if isinstance(row, Note)),
        own_baseline=play_ledger(rows, run),
        unit_baseline=play_ledger(rows, run, rank=1),
        delivered=delivered_bytes(rows, run),
        train_seconds=_sum(row.seconds for row in rows if isinstance(row, Training)),
        server_seconds=_sum(row.seconds for row in rows if isinstance(row, Aggregation)),
    )


def _with_mean(by_domain: Mapping[str, float]) -> dict[str, float]:
    return {**by_domain, MEAN: sum(by_domain.values()) / len(by_domain)}


def _sum(seconds: Iterable[float]) -> float:
    """What is known of them: a ledger has NaN where a clock said nothing."""
    return sum(second for second in seconds if math.isfinite(second))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % confidence interval (Student's t over seeds; 0 for a single value)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, 0.0
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    factor = _T_95[count - 2] if count - 2 < len(_T_95) else _Z_95
    return mean, factor * spread / math.sqrt(count)


def common_rank(reports: Sequence[Report]) -> int | None:
    """The rank of the dense run that several runs are compared with: what they name, or the largest of theirs.

    None where one of them has several ranks by its patterns, or does not tell its rank: each has its own then.
    """
    named = {report.run.baseline_r for report in reports} - {None}
    ranks = [report.own_baseline.ranks for report in reports]
    if named:
        return max(rank for rank in named if rank)
    return max(r[1] for r in ranks if r) if ranks and all(r and r[0] == r[1] for r in ranks) else None


def human_bytes(size: float) -> str:
    """A size in the largest fitting of B, KiB, MiB and GiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
