"""Score against bytes at several budgets, with settings chosen for each of them: the runs.

`front.toml` beside this file lists what is compared: for each testbed, the variants under each budget and under
"published". The first of those is dense FedIT; shares are of what its attendance sends uncoded.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from experiments.points import Point, Reference, measured
from fedloom.errors import ConfigError
from fedloom.records.configfile import load_config
from fedloom.studies.compare import Trial, plan_runs, read_reports

LISTS = Path(__file__).with_name("front.toml")


@dataclass(frozen=True, slots=True)
class Entry:
    """A variant under a budget of a testbed, and its runs, one a seed."""

    testbed: str
    budget: str
    variant: str
    made: tuple[Trial, ...]


def entries(folder: Path, testbeds: Sequence[str], seeds: Sequence[int], out: Path, sets: Sequence[str]) -> list[Entry]:
    """What is compared on some testbeds, whose settings are in `folder`.

    Raises ConfigError for a testbed that the list does not have.
    """
    lists = tomllib.loads(LISTS.read_text(encoding="utf-8"))
    found = []
    for name in testbeds:
        if name not in lists:
            raise ConfigError(f"there is no testbed {name!r}: expected one of {', '.join(lists)}")
        config = load_config(folder / f"{name}.toml", sets)
        for budget, variants in lists[name].items():
            for variant in variants:
                found.append(Entry(name, budget, variant, tuple(plan_runs(config, [variant], seeds, out / name))))
    return found


def distinct(made: Sequence[Entry]) -> list[Trial]:
    """All runs of the entries; that of a variant under two budgets once."""
    return list({run.folder: run for entry in made for run in entry.made}.values())


def points(made: Sequence[Entry]) -> list[Point]:
    """What the entries came to, those without a finished run left out."""
    finished = [(entry, read_reports(entry.made).get(entry.variant, ())) for entry in made]
    reference: dict[str, Reference] = {}
    for entry, found in finished:
        if found:
            dense = fmean(report.dense_bytes for report in found)
            reference.setdefault(entry.testbed, Reference(dense, found[0].baseline.rank))
    return [
        measured(entry.testbed, entry.budget, entry.variant, found, reference[entry.testbed])
        for entry, found in finished
        if found
    ]
