"""A setting chosen on the validation split: a run for each of its values, scored where no final score is taken.

This is how FLoRIST's share of energy τ is meant to be searched (Ramesh & Dass, arXiv 2506.09199: one τ an experiment,
0.80 to 0.99). Two values come out, as in the paper:

    O   the value with the best score
    E   of those values that score at least as well as the methods to match, the one with the fewest bytes (for τ the
        lowest); O itself where none does

The search is free of leakage: its runs take the validation split in place of the held-out one and never learn where the
latter is, with seeds of their own. The chosen settings are written with the held-out split back in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from fedloom.errors import ConfigError
from fedloom.records.config import Config
from fedloom.records.configfile import dump
from fedloom.records.text import file_name
from fedloom.report.numbers import MEAN, Report
from fedloom.studies.compare import Trial, apply_overrides, plan_runs


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one value came to: mean score over seeds, mean bytes of a run."""

    value: str
    score: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The two values, and the score that E had to reach (None where no method was to be matched)."""

    best: Candidate
    efficient: Candidate
    matched: float | None


def hide_heldout(config: Config) -> Config:
    """The settings for a search: scores on the validation split, the held-out one unknown.

    Raises ConfigError where there is no validation split, or where it is the held-out one.
    """
    data = config.data
    if data.validation is None:
        raise ConfigError("data.validation is missing: a setting is chosen on a split that no score is taken on")
    if data.validation == data.heldout:
        raise ConfigError(f"data.validation and data.heldout are both {data.heldout!r}: choosing on it would leak")
    # A run that stops by the validation split does so in a search too.
    kept = data.validation if config.federation.validates else None
    return config.model_copy(update={"data": data.model_copy(update={"heldout": data.validation, "validation": kept})})


def plan_search(
    config: Config, key: str, values: Sequence[str], against: Sequence[str], seeds: Sequence[int], out: Path
) -> list[Trial]:
    """The runs of a search: every value of `key`, then the methods to match, with every seed.

    Raises ConfigError for a key or a value that the settings do not have.
    """
    base = hide_heldout(config)
    made = []
    for value in values:
        label = f"{key}={value}"
        for seed in seeds:
            settings = apply_overrides(base, [label, f"federation.seed={seed}"])
            made.append(Trial(label, seed, settings, out / file_name(label) / f"seed-{seed}"))
    return [*made, *plan_runs(base, against, seeds, out)]


def choose(groups: Mapping[str, Sequence[Report]], key: str, values: Sequence[str]) -> Choice:
    """O and E from the finished runs. Raises ConfigError where the runs of a value are not complete."""
    found = []
    for value in values:
        reports = groups.get(f"{key}={value}")
        if not reports:
            raise ConfigError(f"{key}={value} has no complete run; start the search again to go on with it")
        found.append(Candidate(value, _score(reports), fmean(report.totals.bytes for report in reports)))
    others = [_score(reports) for label, reports in groups.items() if label.partition("=")[0] != key]
    best = max(found, key=lambda one: (one.score, -one.bytes))
    matching = [one for one in found if one.score >= max(others, default=best.score)]
    efficient = min(matching, key=lambda one: one.bytes, default=best)
    return Choice(best, efficient, max(others, default=None))


def _score(reports: Sequence[Report]) -> float:
    return fmean(report.score(MEAN) for report in reports)


def write_choice(config: Config, key: str, choice: Choice, out: Path) -> dict[str, Path]:
    """The settings with each of the two values, held-out split and all, in the folder `out`: name → file."""
    files = {}
    for name, chosen in (("O", choice.best), ("E", choice.efficient)):
        files[name] = out / f"{name}.toml"
        files[name].write_text(dump(apply_overrides(config, [f"{key}={chosen.value}"])), encoding="utf-8")
    return files
