"""The learning rate of every entry of the front, each chosen by itself on the validation split."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from experiments.front import Bed
from fedloom.errors import ConfigError
from fedloom.report.measures import LOSS
from fedloom.report.scores import over_seeds
from fedloom.studies.compare import Trial, plan_runs, read_reports
from fedloom.studies.tune import hide_heldout

RATE = "training.learning_rate"


@dataclass(frozen=True, slots=True)
class Search:
    """A variant, as the front has it without its rate; rate → its runs, one a seed."""

    variant: str
    rates: dict[str, tuple[Trial, ...]]

    @property
    def made(self) -> list[Trial]:
        """All runs."""
        return [run for some in self.rates.values() for run in some]


def without_rate(variant: str) -> str:
    """A variant without what it says of the learning rate."""
    head, _, rest = variant.partition(":")
    kept = [pair for pair in rest.split(",") if pair and not pair.startswith(f"{RATE}=")]
    return ":".join(filter(None, (head, ",".join(kept))))


def with_rate(variant: str, rate: str) -> str:
    """The variant at a rate."""
    return f"{variant}{',' if ':' in variant else ':'}{RATE}={rate}"


def searches(bed: Bed, only: Collection[str], rates: Sequence[str], seeds: Sequence[int], out: Path) -> list[Search]:
    """Every variant of a testbed with every rate, scored on the validation split; the held-out one is hidden.

    only: methods or budgets, all if empty. Raises ConfigError where they name none.
    """
    config = hide_heldout(bed.config)
    variants = [
        without_rate(variant)
        for budget, some in bed.budgets.items()
        for variant in some
        if not only or not {budget, variant.partition(":")[0]}.isdisjoint(only)
    ]
    if not variants:
        raise ConfigError(f"--only {','.join(only)} names no entry: expected methods or budgets of front.toml")
    return [
        Search(name, {rate: tuple(plan_runs(config, [with_rate(name, rate)], seeds, out)) for rate in rates})
        for name in dict.fromkeys(variants)
    ]


def rows(made: Sequence[Search]) -> list[dict[str, str]]:
    """A row a variant: the loss of the base and that at the end for every rate, in nats a token; the best rate."""
    return [_row(search) for search in made]


def _row(search: Search) -> dict[str, str]:
    row, ends = {"run": search.variant, "base": "–"}, {}
    for rate, runs in search.rates.items():
        reports = [report for some in read_reports(runs).values() for report in some]
        if reports:
            values = [report.value(LOSS.key) for report in reports]
            row["base"] = LOSS.show(fmean(report.value(LOSS.key, at=0) for report in reports))
            row[rate] = over_seeds(values, LOSS)
            ends[rate] = fmean(values)
        else:
            row[rate] = "–"
    fit = {rate: end for rate, end in ends.items() if math.isfinite(end)}
    return {**row, "best": min(fit, key=fit.__getitem__, default="–")}
