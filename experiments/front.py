"""Score against bytes at several budgets, with settings chosen for each of them: the runs.

`front.toml` beside this file lists what is compared: for each testbed, the variants under each budget and under
"published". The first of those is dense FedIT; shares of bytes are of what its attendance sends uncoded. Where the
score is the share of a gain, gain and bytes are those of the first variant under `DENSE`, dense FedIT at its best rate.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from experiments.gain import paired
from experiments.points import EXACT_MATCH, PUBLISHED, SHARE_OF_GAIN, Point, Reference, measured
from experiments.work import count_passes
from fedloom.errors import ConfigError
from fedloom.records.config import Config
from fedloom.records.configfile import load_config
from fedloom.report.numbers import Report
from fedloom.studies.compare import Trial, plan_runs, read_reports

LISTS = Path(__file__).with_name("front.toml")
DENSE = "110%"
"""The budget of dense FedIT at its best rate."""
EVALUATED = {EXACT_MATCH: "federation.eval_every=4", SHARE_OF_GAIN: "federation.eval_every=0"}
"""How often a run is scored: for rounds and seconds until a score, or at the start and the end, which is faster."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A variant under a budget of a testbed, and its runs, one a seed. metric: what the testbed is scored by."""

    testbed: str
    budget: str
    variant: str
    made: tuple[Trial, ...]
    metric: str = EXACT_MATCH

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from all others."""
        return self.testbed, self.budget, self.variant

    def named_by(self, words: Collection[str]) -> bool:
        """Whether one of the words is its budget or its method."""
        return not {self.budget, self.variant.partition(":")[0]}.isdisjoint(words)


@dataclass(frozen=True, slots=True)
class Bed:
    """A testbed of front.toml: its settings, what it is scored by, budget → variants."""

    config: Config
    metric: str
    budgets: dict[str, list[str]]


def read_lists(name: str) -> tuple[str, dict[str, list[str]]]:
    """What a testbed is scored by, and budget → variants. Raises ConfigError for one that front.toml does not have."""
    lists = tomllib.loads(LISTS.read_text(encoding="utf-8"))
    if name not in lists:
        raise ConfigError(f"there is no testbed {name!r}: expected one of {', '.join(lists)}")
    metric = lists[name].pop("metric", EXACT_MATCH)
    return metric, lists[name]


def read_bed(name: str, folders: Sequence[Path], sets: Sequence[str] = ()) -> Bed:
    """A testbed whose settings are in one of the folders. Raises ConfigError for one that front.toml does not have."""
    metric, budgets = read_lists(name)
    paths = [folder / f"{name}.toml" for folder in folders]
    path = next((path for path in paths if path.exists()), paths[0])
    return Bed(load_config(path, [EVALUATED[metric], *sets]), metric, budgets)


def entries(
    folders: Sequence[Path], testbeds: Sequence[str], seeds: Sequence[int], out: Path, sets: Sequence[str]
) -> list[Entry]:
    """What is compared on some testbeds, whose settings are in `folders`.

    Raises ConfigError for a testbed that the list does not have.
    """
    found = []
    for name in testbeds:
        bed = read_bed(name, folders, sets)
        for budget, variants in bed.budgets.items():
            for variant in variants:
                made = tuple(plan_runs(bed.config, [variant], seeds, out / name))
                found.append(Entry(name, budget, variant, made, bed.metric))
    return found


def selected(made: Sequence[Entry], only: Collection[str]) -> list[Entry]:
    """The entries to play: those of some methods or budgets and the references of each testbed; all if `only` is empty.

    Raises ConfigError for a word that names no entry.
    """
    for word in only:
        if not any(entry.named_by([word]) for entry in made):
            raise ConfigError(f"--only: no entry has the method or the budget {word!r}")
    kept = {id(entry) for entry in made if not only or entry.named_by(only)}
    kept |= {id(entry) for entry in references(made)}
    return [entry for entry in made if id(entry) in kept]


def references(made: Sequence[Entry]) -> list[Entry]:
    """Dense FedIT of each testbed, which shares of bytes are of: as published, or at its best rate where the score is a
    share of that run's gain. Its attendance, and so its bytes, are those of any run with equal seeds.
    """
    first: dict[str, Entry] = {}
    for entry in made:
        if entry.budget == (DENSE if entry.metric == SHARE_OF_GAIN else PUBLISHED):
            first.setdefault(entry.testbed, entry)
    return list(first.values())


def distinct(made: Sequence[Entry]) -> list[Trial]:
    """All runs of the entries; that of a variant under two budgets once."""
    return list({run.folder: run for entry in made for run in entry.made}.values())


def kind(run: Trial) -> str:
    """What runs that take about as long have in common: testbed and variant, on real text the testbed alone.

    There training takes nearly all of the time, and a trial of every variant would take too much of it.
    """
    testbed = run.folder.parent.parent.name
    return testbed if run.config.federation.eval_every == 0 else f"{testbed} {run.label}"


def points(made: Sequence[Entry]) -> list[Point]:
    """What the entries came to, those without a finished run left out; for a share of a gain, seeds without a finished
    dense run too. A testbed whose reference has no finished run has none: nothing else may stand for dense FedIT.
    """
    finished = [(entry, read_reports(entry.made).get(entry.variant, ())) for entry in made]
    firsts = {entry.key for entry in references(made)}
    reference = {
        entry.testbed: Reference(
            fmean(report.dense_bytes for report in found),
            found[0].baseline.rank,
            tuple(found) if entry.metric == SHARE_OF_GAIN else (),
        )
        for entry, found in finished
        if entry.key in firsts and found
    }
    return [
        measured(entry.testbed, entry.budget, entry.variant, runs, reference[entry.testbed])
        for entry, found in finished
        if entry.testbed in reference and (runs := _scored(entry, found, reference))
    ]


def with_passes(found: Iterable[Point], made: Sequence[Entry]) -> list[Point]:
    """The points with what follows from the settings of their entries, where they have one: the passes of a client, and
    where seconds until a score are known, those of the whole run.
    """
    configs = {entry.key: entry.made[0].config for entry in made}
    counted = []
    for point in found:
        config = configs.get((point.testbed, point.budget, point.variant))
        if config is not None:
            forward, backward = count_passes(config)
            # Seconds until a score are those of so many rounds; all rounds take as long each.
            whole = config.federation.num_rounds / point.rounds
            walls = point.work.walls or tuple(whole * seconds for seconds in point.seconds if math.isfinite(whole))
            point = replace(point, work=replace(point.work, forward=forward, backward=backward, walls=walls))
        counted.append(point)
    return counted


def _scored(entry: Entry, found: Sequence[Report], reference: dict[str, Reference]) -> Sequence[Report]:
    """The runs that have a score."""
    if entry.metric != SHARE_OF_GAIN or not found:
        return found
    return [run for run, _ in paired(found, reference[entry.testbed].dense)]
