"""The figures of a run, and of several runs that differ in their seed only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from fedloom.errors import CheckpointError
from fedloom.records.ledger import Aggregation, Choice, Evaluation, Note, Row, RunRow, Totals, Training, totals
from fedloom.report.baseline import Baseline, delivered_bytes, play_ledger
from fedloom.report.facts import Circumstances, gather_facts

MEAN = "mean"
"""The name under which the mean over domains stands beside them."""

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
_Z_95 = 1.96


@dataclass(frozen=True, slots=True)
class Point:
    """The global model after a round, and the bytes sent by then, both ways.

    values: measure ("exact_match", "loss", "bits_per_byte", or one of the user's) → domain (and their mean) → value.
    """

    round: int
    values: Mapping[str, Mapping[str, float]]
    bytes: int

    @property
    def scores(self) -> Mapping[str, float]:
        """Exact match by domain, and the mean."""
        return self.values["exact_match"]

    @property
    def losses(self) -> Mapping[str, float]:
        """Held-out loss by domain in nats a token, and the mean."""
        return self.values["loss"]


@dataclass(frozen=True, slots=True)
class Report:
    """One run. `points` are the evaluated rounds; `losses` holds each client's training losses, in order. `exported` is
    the round whose model the run leaves, where it was chosen on the validation split; then the last point is its too.

    `training` holds the mean training loss of every round that had turns, with the bytes sent by then. `examples`
    counts the held-out examples of an evaluation, 0 where the ledger does not say. `train_seconds` and
    `server_seconds` are sums over all turns and over all rounds. own_baseline: dense FedIT at the run's own largest
    ranks; unit_baseline: at rank 1, by which every other rank follows. delivered: client → bytes of the result, sent
    when all rounds were over. facts: the run's circumstances.
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
    training: tuple[Point, ...] = ()
    examples: int = 0
    exported: int | None = None
    facts: Circumstances = Circumstances()

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
        return self.value_at("exact_match", round)

    def value_at(self, measure: str, round: int) -> float:
        """The mean over domains of a measure at the last evaluation up to a round; NaN where it was not taken."""
        found = [point.values.get(measure, {}).get(MEAN, math.nan) for point in self.points if point.round <= round]
        return found[-1] if found else math.nan

    def score(self, domain: str, at: int = -1) -> float:
        """Exact match at the first (0) or last (-1) evaluation; NaN where there was none."""
        return self.value("exact_match", domain, at)

    def value(self, measure: str, domain: str = MEAN, at: int = -1) -> float:
        """A measure at the first (0) or last (-1) evaluation; NaN where it was not taken."""
        return self.points[at].values.get(measure, {}).get(domain, math.nan) if self.points else math.nan

    @property
    def ended_worse(self) -> bool:
        """Whether the mean held-out loss was higher at the end than at the start, or no longer a finite number."""
        if len(self.points) < 2:
            return False
        before, after = self.value("loss", at=0), self.value("loss")
        return math.isfinite(before) and not after <= before  # a NaN is no better than anything


def summarise(rows: Sequence[Row], origin: str = "the ledger") -> Report:
    """The report of one ledger's rows. Raises CheckpointError where the row that says what the run is, is missing."""
    run = next((row for row in reversed(rows) if isinstance(row, RunRow)), None)
    if run is None:
        raise CheckpointError(f"{origin} records no run: its first row is missing")
    session = rows[rows.index(run) :]  # a run that was given more rounds may have chosen one before
    choice = next((row for row in reversed(session) if isinstance(row, Choice)), None)
    if choice is not None:  # it may have stopped early
        run = replace(run, num_rounds=choice.round)
    sums = totals(rows)
    rounds = range(max([0, *sums.by_round, *(row.round for row in rows if isinstance(row, Evaluation | Training))]) + 1)
    sent = list(accumulate(sum(sums.by_round.get(round, (0, 0))) for round in rounds))
    evaluations: dict[int, dict[str, Evaluation]] = {}
    losses: dict[str, list[float]] = {}
    trained: dict[int, list[float]] = {}
    for row in rows:
        if isinstance(row, Evaluation):
            evaluations.setdefault(row.round, {})[row.domain] = row
        elif isinstance(row, Training):
            losses.setdefault(row.client, []).append(row.loss)
            trained.setdefault(row.round, []).append(row.loss)
    points = [Point(round, values_of(found), sent[round]) for round, found in sorted(evaluations.items())]
    last = evaluations[max(evaluations)] if evaluations else {}
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
        training=tuple(
            Point(round, {"training_loss": {MEAN: sum(found) / len(found)}}, sent[round])
            for round, found in sorted(trained.items())
        ),
        examples=sum(row.examples for row in last.values()),
        exported=None if choice is None else choice.exported,
        facts=gather_facts(rows),
    )


def values_of(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, float]]:
    """Measure → domain (and their mean) → value, of one evaluation of every domain."""
    found: dict[str, dict[str, float]] = {}
    for domain, row in evaluations.items():
        own = {"exact_match": row.exact_match, "loss": row.loss}
        bits = row.bits_per_byte
        for measure, value in {**own, **({} if bits is None else {"bits_per_byte": bits}), **row.metrics}.items():
            found.setdefault(measure, {})[domain] = value
    return {measure: _with_mean(by_domain) for measure, by_domain in found.items()}


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
