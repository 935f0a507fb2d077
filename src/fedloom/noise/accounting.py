"""What noise is worth, on single examples above all: ε, an attacker's best chances, and the noise that an ε needs.

The mechanism is that of DP-SGD: every step draws each example with the same chance, independently, adds up their
clipped gradients, and noise (Abadi et al., arXiv 1607.00133). Two data sets are neighbours where they are the same but
for one example, which in the other contributes nothing ("zero-out", Ponomareva et al., arXiv 2303.00654, sect. 2.1.1):
their number of examples is the same, and the privacy loss is the one of adding or removing an example. Losses are
composed as distributions by dp-accounting, on a grid that errs on the safe side. Subsampling is counted there alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

from fedloom.errors import ConfigError

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

GRID = 1e-3
"""Width of a cell of privacy loss: ε is at most a thousandth too large, in some ten milliseconds."""
COARSE = 1e-2
"""The same to look for noise with, ten times as fast; ε is at most a hundredth too large."""
MOST_NOISE = 1e4
"""Beyond this noise multiplier nothing can be learnt, and nobody asks for the ε."""
LEAST_NOISE = 0.05
"""Below it there is as good as none."""
DIGITS = 1e-3
"""To what share the noise for an ε is found, upwards."""
FALSE_ALARMS = 0.01
"""The rate of false alarms at which an attack's rate of hits is stated."""


@dataclass(frozen=True, slots=True, order=True)
class SampledNoise:
    """Steps that each draw every example with the same chance, and add noise to the sum of clipped gradients.

    sampling_rate: that chance, 0 … 1. noise_multiplier: standard deviation of the noise over the clipping norm.
    """

    __pydantic_config__ = {"extra": "forbid"}
    sampling_rate: float
    noise_multiplier: float
    steps: int


@dataclass(frozen=True, slots=True)
class AttackRisk:
    """What the best attacker achieves who knows everything but whether one example was there.

    advantage: the most that his rate of hits is above his rate of false alarms. hits: his rate of hits at a rate of
    false alarms of FALSE_ALARMS.
    """

    advantage: float
    hits: float


def example_epsilon(spent: Iterable[SampledNoise], delta: float) -> float:
    """The ε at this δ of all that was spent on a site's examples together: (ε, δ) at example level."""
    return _epsilon(tuple(merge(spent)), delta)


@lru_cache(maxsize=4096)
def _epsilon(merged: tuple[SampledNoise, ...], delta: float) -> float:
    return float(_compose(merged).get_epsilon_for_delta(delta)) if merged else 0.0


def example_risk(spent: Iterable[SampledNoise]) -> AttackRisk:
    """The attack risk of all that was spent on a site's examples together."""
    merged = merge(spent)
    if not merged:
        return AttackRisk(0.0, FALSE_ALARMS)
    analysis, losses = _riskcal(), _compose(merged)
    misses = float(analysis.get_beta_from_pld(losses, alpha=FALSE_ALARMS))
    return AttackRisk(float(analysis.get_advantage_from_pld(losses)), 1.0 - misses)


def gaussian_risk(mu: float) -> AttackRisk:
    """The attack risk of a Gaussian mechanism of this μ, as a site's own noise is."""
    if not mu:
        return AttackRisk(0.0, FALSE_ALARMS)
    analysis = _riskcal()
    misses = float(analysis.get_beta_from_gdp(mu, FALSE_ALARMS))
    return AttackRisk(float(analysis.get_advantage_from_gdp(mu)), 1.0 - misses)


@lru_cache(maxsize=4096)
def find_noise(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The least noise multiplier with which so many steps cost at most this ε at this δ.

    Raises ConfigError for an ε that no amount of noise reaches.
    """

    def keeps(noise: float, grid: float) -> bool:
        one = SampledNoise(sampling_rate, noise, steps)
        return bool(_compose((one,), grid).get_epsilon_for_delta(delta) <= epsilon)

    # By factors of two first: with far too little noise the distribution of losses has no end.
    high = 1.0
    while not keeps(high, COARSE):
        high *= 2.0
        if high > MOST_NOISE:
            raise ConfigError(
                f"training.dp.epsilon = {epsilon:g} cannot be kept in {steps:,} steps that each draw "
                f"{sampling_rate:.2%} of the examples, at δ = {delta:.2g}: take fewer steps or a larger ε"
            )
    while high > LEAST_NOISE and keeps(0.5 * high, COARSE):
        high *= 0.5
    # A coarser grid never says too little ε, so that the noise found on it is enough, and a little less may be.
    high = _least(lambda noise: keeps(noise, COARSE), 0.5 * high, high)
    return _least(lambda noise: keeps(noise, GRID), 0.98 * high, high)


def _least(keeps: Callable[[float], bool], low: float, high: float) -> float:
    """Between the two the least that keeps, which `high` does, to a share of DIGITS upwards."""
    while high - low > DIGITS * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def merge(spent: Iterable[SampledNoise]) -> tuple[SampledNoise, ...]:
    """The same with the steps of equal noise added up, in order."""
    steps: dict[tuple[float, float], int] = defaultdict(int)
    for one in spent:
        steps[one.sampling_rate, one.noise_multiplier] += one.steps
    return tuple(SampledNoise(*what, count) for what, count in sorted(steps.items()) if count)


@lru_cache(maxsize=64)
def _compose(merged: tuple[SampledNoise, ...], grid: float = GRID) -> PrivacyLossDistribution:
    """The distribution of the privacy loss of all of it."""
    try:
        from dp_accounting.pld import privacy_loss_distribution as losses
    except ImportError:
        raise ConfigError(MISSING) from None
    found = None
    for one in merged:
        single = losses.from_gaussian_mechanism(
            standard_deviation=one.noise_multiplier,
            sampling_prob=one.sampling_rate,
            value_discretization_interval=grid,
            use_connect_dots=True,
        )
        part = single.self_compose(one.steps)
        found = part if found is None else found.compose(part)
    return found


MISSING = "the ε of noise on single examples needs dp-accounting and riskcal: pip install 'fedloom[privacy]'"


def _riskcal() -> ModuleType:
    try:
        from riskcal import analysis
    except ImportError:
        raise ConfigError(MISSING) from None
    found: ModuleType = analysis
    return found


def summed_cost(sites: int, deviation: float, reach: float, values: int) -> float:
    """The ρ of concentrated privacy of one sum with discrete Gaussian noise of so many sites (`secagg.noise`).

    deviation: of each site's noise, in steps of the grid. reach: the most by which two vectors of one site can differ
    in Euclidean norm, in steps. A sum of discrete Gaussians is nearly one: what is between them vanishes from a
    deviation of about 3 on (Kairouz, Liu & Steinke, arXiv 2102.06387, theorem 1). The ρ of several sums add up.
    """
    tail = 10.0 * math.fsum(math.exp(-2.0 * (math.pi * deviation) ** 2 * k / (k + 1)) for k in range(1, sites))
    whole = reach / (math.sqrt(sites) * deviation)
    return 0.5 * min(whole**2 + 0.5 * tail * values, (whole + tail * math.sqrt(values)) ** 2)


def concentrated_epsilon(cost: float, delta: float) -> float:
    """The ε at this δ of what is ρ-concentrated, ρ the cost; by way of Rényi's divergence at many orders."""
    if cost == 0:
        return 0.0
    try:
        from dp_accounting import rdp
    except ImportError:
        raise ConfigError(MISSING) from None
    best = 1.0 + math.sqrt(math.log(1.0 / delta) / cost)  # near the order that is best
    orders = sorted({*(1.0 + (best - 1.0) * 1.05**k for k in range(-40, 41))})
    found, _ = rdp.compute_epsilon(orders, [order * cost for order in orders], delta)
    return float(found)
