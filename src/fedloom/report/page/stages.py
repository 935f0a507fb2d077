"""What the time went into: training, compressing, coding, moving, averaging, evaluating."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedloom.records.ledger import Aggregation, Evaluation, Roll, Row, Training, Transfer
from fedloom.report.facts import human_seconds
from fedloom.report.page.charts import Axis, Chart, Series, number
from fedloom.report.page.model import Section, Table
from fedloom.report.page.run import Variant
from fedloom.report.sampling import sample, say_sampled

STAGES = ("train", "compress", "encode", "transfer", "decode", "aggregate", "evaluate")
_SECONDS = Axis("seconds", "seconds", low=0)
_NOTE = (
    "Clients' stages are sums over the clients of a round, which may have worked side by side. Transfer is what a "
    "round across machines waited beyond its slowest training."
)


def add_stages(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """Round → stage → seconds, of the stages that the ledger tells of."""
    found: dict[int, dict[str, float]] = {}
    slowest: dict[int, float] = {}

    def add(round: int, stage: str, seconds: float) -> None:
        if stage in STAGES and math.isfinite(seconds) and seconds > 0:
            held = found.setdefault(round, {})
            held[stage] = held.get(stage, 0.0) + seconds

    for row in rows:
        match row:
            case Training():
                add(row.round, "train", row.seconds)
                slowest[row.round] = max(slowest.get(row.round, 0.0), row.seconds)
                for stage, seconds in row.stages.items():
                    add(row.round, stage, seconds)
            case Aggregation():
                for stage, seconds in row.stages.items():
                    add(row.round, stage, seconds)
                add(row.round, "aggregate", row.seconds - math.fsum(row.stages.values()))
            case Evaluation():
                add(row.round, "evaluate", row.seconds)
            case Transfer():
                add(row.round, "transfer", row.seconds)
            case Roll():
                add(row.round, "transfer", row.seconds - slowest.get(row.round, 0.0))
            case _:
                pass
    return dict(sorted(found.items()))


def describe_time(rows: Sequence[Row]) -> Section | None:
    """Where one run's time went, by round and in all."""
    found = add_stages(rows)
    stages = [stage for stage in STAGES if any(stage in held for held in found.values())]
    if not stages:
        return None
    rounds = sample(list(found.items()))
    series = [
        Series(stage, [(round, number(held.get(stage, 0.0), 4)) for round, held in rounds], STAGES.index(stage))
        for stage in stages
    ]
    sums = {stage: sum(held.get(stage, 0.0) for held in found.values()) for stage in stages}
    whole = sum(sums.values())
    told = [(stage, human_seconds(seconds), f"{100 * seconds / whole:.1f} %") for stage, seconds in sums.items()]
    chart = Chart(
        "stages-rounds",
        "stack",
        "Time by stage and round",
        Axis("round", whole=True),
        _SECONDS,
        series,
        f"{_NOTE} {say_sampled('rounds', len(found))}".strip(),
    )
    total = Table(
        "stages",
        "Time by stage",
        ("stage", "time", "share"),
        [*told, ("all", human_seconds(whole), "")],
        total=True,
    )
    return Section("time", "Time", [chart, total])


def compare_time(variants: Sequence[Variant]) -> Section | None:
    """Where the time of several variants went, on the mean over seeds."""
    sums: list[dict[str, float]] = []
    for variant in variants:
        sum_: dict[str, float] = {}
        for run in variant.runs:
            for stages in add_stages(run.rows).values():
                for stage, seconds in stages.items():
                    sum_[stage] = sum_.get(stage, 0.0) + seconds / len(variant.runs)
        sums.append(sum_)
    told = [stage for stage in STAGES if any(stage in held for held in sums)]
    if not told:
        return None
    series = [
        Series(
            stage,
            [(number(held.get(stage, 0.0), 4), place) for place, held in enumerate(sums)],
            STAGES.index(stage),
        )
        for stage in told
    ]
    axis = Axis("run", names=[variant.name for variant in variants])
    chart = Chart("stages", "bars", "Time by stage", _SECONDS, axis, series, _NOTE)
    return Section("time", "Time", [chart], "Of a whole run, on the mean over seeds.")
