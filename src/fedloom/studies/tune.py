"""A setting chosen on the validation split: a run for each of its values, scored where no final score is taken.

This is how FLoRIST's share of energy τ is meant to be searched (Ramesh & Dass, arXiv 2506.09199: one τ an experiment,
0.80 to 0.99). Two values come out, as in the paper:

    O   the value with the best score
    E   of those values that score at least as well as the methods to match, the one with the fewest bytes (for τ the
        lowest); O itself where none does

What the best score is, `ranking` says: exact match where it tells the values apart, otherwise the loss.

The search is free of leakage: its runs take the validation split in place of the held-out one and never learn where the
latter is, with seeds of their own. The chosen settings are written with the held-out split back in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedloom.errors import ConfigError
from fedloom.records.config import Config
from fedloom.records.configfile import dump
from fedloom.records.text import file_name
from fedloom.report.measures import Measure
from fedloom.report.numbers import Report
from fedloom.studies.compare import Trial, apply_overrides, plan_runs
from fedloom.studies.ranking import Candidate, at_least, deciding_measure


@dataclass(frozen=True, slots=True)
class Choice:
    """The two values, and the score that E had to reach (None where no method was to be matched).

    measure: what decided. notes: in words, where there was a tie, and who was left out and why.
    """

    best: Candidate
    efficient: Candidate
    matched: float | None
    measure: Measure
    notes: tuple[str, ...] = ()


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


def choose(groups: Mapping[str, Sequence[Report]], key: str, values: Sequence[str], by: str = "auto") -> Choice:
    """O and E from the finished runs. by: the measure that decides, as evaluation.metric.

    Raises ConfigError where the runs of a value are not complete, and where no value may be chosen.
    """
    found = []
    for value in values:
        reports = groups.get(f"{key}={value}")
        if not reports:
            raise ConfigError(f"{key}={value} has no complete run; start the search again to go on with it")
        found.append(Candidate(value, tuple(reports)))
    others = [Candidate(name, tuple(runs)) for name, runs in groups.items() if name.partition("=")[0] != key]
    left_out = [f"{key} = {one.value} is not chosen: {one.unfit}." for one in found if one.unfit]
    fit, rivals = ([one for one in some if not one.unfit] for some in (found, others))
    if not fit:
        raise ConfigError(f"no value of {key} can be chosen. {' '.join(left_out)}")
    measure, tie = deciding_measure(by, [*fit, *rivals])
    best = min(fit, key=lambda one: one.rank(measure))
    target = min(rivals, key=lambda one: one.rank(measure), default=best).score(measure)
    matching = [one for one in fit if at_least(one, target, measure)]
    efficient = min(matching, key=lambda one: one.bytes, default=best)
    equal = [one.value for one in fit if one.rank(measure)[:2] == best.rank(measure)[:2]]
    shared = f"{key} = {' and '.join(equal)} score the same: the fewest bytes decide." if len(equal) > 1 else ""
    notes = (note for note in (*left_out, tie, shared) if note)
    return Choice(best, efficient, target if rivals else None, measure, tuple(notes))


def write_choice(config: Config, key: str, choice: Choice, out: Path) -> dict[str, Path]:
    """The settings with each of the two values, held-out split and all, in the folder `out`: name → file."""
    files = {}
    for name, chosen in (("O", choice.best), ("E", choice.efficient)):
        files[name] = out / f"{name}.toml"
        files[name].write_text(dump(apply_overrides(config, [f"{key}={chosen.value}"])), encoding="utf-8")
    return files
