"""What privacy costs: the same runs under several ε, for single examples and for whole sites.

At example level ε is that of [training.dp], with δ = 1/n at every site. At site level the noise is in the secure sum
(privacy.noise_multiplier), with δ = `DELTA`. The whole, whose gain is 100 %, is the run of each level without noise.
Level "noise" is what the noise of site level does by itself, where nobody trains: a base that is confident and wrong
gains by anything that makes it less confident, and that is no use of the sites' data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.gain import gain, paired, share_kept
from fedloom.errors import ConfigError
from fedloom.noise.accounting import concentrated_epsilon
from fedloom.records.config import Config
from fedloom.report.measures import EXACT_MATCH, LOSS
from fedloom.report.numbers import Report, interval
from fedloom.report.scores import over_seeds
from fedloom.studies.compare import Trial, client_names, plan_runs, read_reports
from fedloom.workspace.privacy import DELTA

EPSILONS = (1.0, 3.0, 8.0, math.inf)
_CORE = "lora-xs:clients=null,lora.r=2,lora.lora_alpha=4"
METHODS = {"example": "fedit:clients=null,lora.r=2,lora.lora_alpha=4", "site": _CORE, "noise": _CORE}
"""Level → variant. Fewer values carry less noise: whole sites train four a module."""
WHOLE = {"noise": "site"}
"""Level → that of the run without noise whose gain is 100 %, where it is another one."""


@dataclass(frozen=True, slots=True)
class Steps:
    """How clients train where single examples are protected: few steps of many examples (docs/LOG.md has the trials).

    batch: examples that a step draws on average, or all that a client has; count: steps a round; turns: rounds that a
    client is in at most, None for all of them.
    """

    batch: int
    count: int
    learning_rate: float
    turns: int | None = None


STEPS = {"demo": Steps(256, 4, 2.5e-2), "many": Steps(384, 1, 2e-2, turns=10)}
"""Testbed → its steps at example level."""
TOGETHER = 64
"""Examples in a forward pass; a step draws several times as many."""
SITE_STEPS, SITE_RATE = 20, 2e-2
"""Where whole sites are protected everybody is in the one round, of so many steps."""
SPREAD = 0.17
"""Standard deviation of the noise on each value of the mean of whole sites' changes; the less, the smaller a change.

The same for every ε and any number of sites: what it does to the model by itself does not depend on them, and a change
is scaled down to what ε allows. docs/LOG.md has the trials.
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """The runs under one ε of one level."""

    level: str
    epsilon: float
    variant: str
    made: tuple[Trial, ...]


def parse_epsilons(text: str) -> list[float]:
    """`1,3,8,inf`. Raises ConfigError for another form; without noise is always among them, last."""
    try:
        found = {float(word) for word in text.split(",")}
    except ValueError:
        found = {-1.0}
    if not all(epsilon > 0 for epsilon in found):
        raise ConfigError(f"--epsilons {text!r}: expected numbers above 0, joined by commas; inf is without noise")
    return sorted(found | {math.inf})


def site_noise(epsilon: float) -> float:
    """The noise multiplier in a secure sum with which one round costs this ε at site level, but for rounding."""
    low, high = 0.0, 1.0
    while concentrated_epsilon(high, DELTA) < epsilon:
        low, high = high, 2 * high
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if concentrated_epsilon(middle, DELTA) > epsilon else (middle, high)
    # A round costs ρ = (2 C)² / 2 (σ C)².
    return math.sqrt(2.0 / low)


def variant(level: str, method: str, epsilon: float, sites: int, steps: Steps) -> str:
    """The variant of a level under an ε, in a run of so many sites."""
    own = _protect_examples(epsilon, steps) if level == "example" else _protect_sites(level, epsilon, sites)
    return ",".join([f"{method}{'' if ':' in method else ':'}".rstrip(","), *own])


def _protect_examples(epsilon: float, steps: Steps) -> list[str]:
    size = min(steps.batch, TOGETHER)
    own = [
        f"training.learning_rate={steps.learning_rate:g}",
        f"training.max_steps={steps.count}",
        f"training.per_device_train_batch_size={size}",
        f"training.gradient_accumulation_steps={math.ceil(steps.batch / size)}",
    ]
    if math.isfinite(epsilon):
        own.append(f"training.dp.epsilon={epsilon:g}")
        own.extend([] if steps.turns is None else [f"training.dp.rounds={steps.turns}"])
    return own


def _protect_sites(level: str, epsilon: float, sites: int) -> list[str]:
    trains = level == "site"
    own = [
        "privacy.secure_aggregation=true",
        "federation.weighting=uniform",
        "federation.num_rounds=1",
        "federation.fraction_train=1.0",
        f"privacy.least_cohort={sites}",
        f"training.max_steps={SITE_STEPS if trains else 1}",
        f"training.learning_rate={SITE_RATE if trains else 1e-12:g}",
    ]
    if math.isinf(epsilon):
        return [*own, "privacy.clip=32"]
    noise = site_noise(epsilon)
    norm = SPREAD * sites / noise
    room = norm * (1.0 + 10.0 * noise)
    return [*own, f"privacy.noise_multiplier={noise:.6g}", f"privacy.clip_norm={norm:.6g}", f"privacy.clip={room:.6g}"]


def plan(
    config: Config, epsilons: Sequence[float], methods: Mapping[str, str], steps: Steps, seeds: Sequence[int], out: Path
) -> list[Setting]:
    """Every ε of every level with every seed."""
    made, sites = [], len(client_names(config))
    for level, method in methods.items():
        for epsilon in epsilons:
            if level == "noise" and math.isinf(epsilon):
                continue
            named = variant(level, method, epsilon, sites, steps)
            runs = tuple(plan_runs(config, [named], seeds, out / f"{level}-{epsilon:g}"))
            made.append(Setting(level, epsilon, named, runs))
    return made


def rows(made: Sequence[Setting]) -> list[dict[str, str]]:
    """A row a setting whose runs are complete: score, gain, its share of that without noise, bytes."""
    found = {(one.level, one.epsilon): read_reports(one.made).get(one.variant, []) for one in made}
    return [
        _row(one, found[one.level, one.epsilon], found.get((WHOLE.get(one.level, one.level), math.inf), []))
        for one in made
        if found[one.level, one.epsilon]
    ]


def _row(one: Setting, runs: Sequence[Report], whole: Sequence[Report]) -> dict[str, str]:
    pairs = paired(runs, whole)
    share, half = share_kept(pairs) if pairs else (math.nan, 0.0)
    spread = f" ± {half:.1f}" if len(pairs) > 1 else ""
    return {
        "level": one.level,
        "ε": "∞" if math.isinf(one.epsilon) else f"{one.epsilon:g}",
        "run": one.variant.partition(",privacy.")[0].partition(",training.max_steps")[0],
        "seeds": str(len(runs)),
        "exact match %": over_seeds([run.value(EXACT_MATCH.key) for run in runs], EXACT_MATCH),
        "gain, nats a token": over_seeds([gain(run) for run in runs], LOSS),
        "of the gain without noise %": f"{share:.1f}{spread}" if math.isfinite(share) else "–",
        "bytes": f"{interval([run.totals.bytes for run in runs])[0]:,.0f}",
    }
