"""The learning rate of every entry of the front, each chosen by itself on the validation split."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from experiments.front import Bed
from fedloom.errors import ConfigError
from fedloom.records.config import Config
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


def listed(bed: Bed, only: Collection[str], methods: Sequence[str] = ()) -> list[str]:
    """The variants of a testbed without their rates. only: methods or budgets, all if empty.

    methods: variants in place of the testbed's. Raises ConfigError where `only` names none, or both are given.
    """
    if only and methods:
        raise ConfigError("--only chooses among the entries of front.toml, and --methods takes their place: give one")
    variants = [without_rate(variant) for variant in methods] or [
        without_rate(variant)
        for budget, some in bed.budgets.items()
        for variant in some
        if not only or not {budget, variant.partition(":")[0]}.isdisjoint(only)
    ]
    if not variants:
        raise ConfigError(f"--only {','.join(only)} names no entry: expected methods or budgets of front.toml")
    return list(dict.fromkeys(variants))


def searches(
    config: Config, variants: Sequence[str], rates: Sequence[str], seeds: Sequence[int], out: Path
) -> list[Search]:
    """Every variant with every rate, scored on the validation split; the held-out one is hidden."""
    hidden = hide_heldout(config)
    return [
        Search(name, {rate: tuple(plan_runs(hidden, [with_rate(name, rate)], seeds, out)) for rate in rates})
        for name in variants
    ]


def rows(made: Sequence[Search]) -> list[dict[str, str]]:
    """A row a variant: the loss of the base and that at the end for every rate, in nats a token; the best rate, and the
    bytes of its runs, both ways, as a share of dense fp32 FedIT's.
    """
    return [_row(search) for search in made]


def _row(search: Search) -> dict[str, str]:
    row, ends, shares = {"run": search.variant, "base": "–"}, {}, {}
    for rate, runs in search.rates.items():
        reports = [report for some in read_reports(runs).values() for report in some]
        if reports:
            values = [report.value(LOSS.key) for report in reports]
            row["base"] = LOSS.show(fmean(report.value(LOSS.key, at=0) for report in reports))
            row[rate] = over_seeds(values, LOSS)
            ends[rate] = fmean(values)
            shares[rate] = f"{100 * fmean(report.totals.bytes / report.dense_bytes for report in reports):.2f}"
        else:
            row[rate] = "–"
    fit = {rate: end for rate, end in ends.items() if math.isfinite(end)}
    best = min(fit, key=fit.__getitem__, default="–")
    return {**row, "best": best, "of dense fp32 %": shares.get(best, "–")}
