"""What changes with the width of the base: the same data, rounds and seeds on several bases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.gain import gain, paired, share_kept
from fedloom.errors import ConfigError
from fedloom.records.config import Config
from fedloom.report.measures import BITS, LOSS
from fedloom.report.numbers import Report, interval
from fedloom.report.scores import over_seeds
from fedloom.studies.compare import Trial, apply_overrides, plan_runs, read_reports

VARIANTS = (
    "fedit:wire.values=fp32,training.learning_rate=4e-3",
    "loom:wire.client_budget=1%,training.learning_rate=8e-3",
    "loom:wire.client_budget=0.3%,training.learning_rate=8e-3",
    "fedsrd:training.learning_rate=4e-3",
)
"""What is played on every base; the first is dense FedIT, whose gain is the whole."""


@dataclass(frozen=True, slots=True)
class Base:
    """A base model by its width, in words, and the runs on it."""

    width: str
    made: tuple[Trial, ...]


def parse_bases(text: str) -> dict[str, str]:
    """`128=PATH,512=PATH`: width → path. Raises ConfigError for another form."""
    found = [pair.strip().partition("=") for pair in text.split(",") if pair.strip()]
    if not found or not all(width and path for width, _, path in found):
        raise ConfigError(f"--bases {text!r}: expected WIDTH=FOLDER, several joined by commas")
    return {width: path for width, _, path in found}


def plan(
    config: Config, bases: Mapping[str, str], variants: Sequence[str], seeds: Sequence[int], out: Path
) -> list[Base]:
    """Every variant on every base with every seed."""
    made = []
    for width, path in bases.items():
        own = apply_overrides(config, [f'model.path="{Path(path).absolute()}"'])
        made.append(Base(width, tuple(plan_runs(own, variants, seeds, out / f"width-{width}"))))
    return made


def rows(bases: Sequence[Base], variants: Sequence[str]) -> list[dict[str, str]]:
    """A row a base and variant whose runs are complete: the base's loss, gain, its share of dense FedIT's, bytes."""
    found = []
    for base in bases:
        groups = read_reports(base.made)
        dense = groups.get(variants[0], [])
        found += [_row(base.width, name, groups[name], dense) for name in variants if name in groups]
    return found


def _row(width: str, variant: str, runs: Sequence[Report], dense: Sequence[Report]) -> dict[str, str]:
    pairs, rank = paired(runs, dense), runs[0].own_baseline.ranks
    share, half = share_kept(pairs) if pairs else (math.nan, 0.0)
    spread = f" ± {half:.1f}" if len(pairs) > 1 else ""
    return {
        "width": width,
        "rank": f"{rank[1]}" if rank else "–",
        "run": variant,
        "seeds": str(len(runs)),
        "base, nats a token": LOSS.show(runs[0].value(LOSS.key, at=0)),
        "base, bits a byte": BITS.show(runs[0].value(BITS.key, at=0)),
        "gain, nats a token": over_seeds([gain(run) for run in runs], LOSS),
        "of dense FedIT's gain %": f"{share:.1f}{spread}" if math.isfinite(share) else "–",
        "of dense fp32 FedIT's bytes %": f"{_share_of_bytes(runs):.2f}",
    }


def _share_of_bytes(runs: Sequence[Report]) -> float:
    return interval([100 * run.totals.bytes / run.dense_bytes for run in runs])[0]
