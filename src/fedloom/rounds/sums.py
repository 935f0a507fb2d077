"""How the secure sums of a run are made: the grid of their values, and who must be in one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedloom.noise.accounting import summed_cost
from fedloom.secagg import Grid, least_threshold
from fedloom.secagg.noise import most_reach

SUM = "the sum of the sites"
"""The name under which a sum is averaged. No site can have it: it has spaces."""


_CUT = 0.01
"""Share of a site's values beyond the grid above which that is said: a few outliers are cut with hardly a loss."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """What the grid did to a site's change: how many values there are, and how many were cut to `reach`.

    largest: magnitude of a value, before. error: norm of what rounding added over the norm of the change; 0 where noise
    is added on purpose, beside which rounding is nothing.
    """

    values: int
    cut: int
    reach: float
    largest: float
    error: float

    def describe(self) -> str:
        """What is wrong with the grid, and what to do; "" where it is fine."""
        said = []
        if self.cut > _CUT * self.values:
            said.append(
                f"{100 * self.cut / self.values:.1f} % of its change's values were cut at privacy.clip, "
                f"{self.reach:.3g}; the largest was {self.largest:.3g}: a larger privacy.clip keeps them"
            )
        if self.error > 1.0:
            said.append(
                f"rounding to the grid changed it by {self.error:.1f} times its own size: more privacy.bits, a smaller "
                f"privacy.clip (the largest value was {self.largest:.3g}) or weighting = 'uniform' make it finer"
            )
        return "; ".join(said)


@dataclass(frozen=True, slots=True)
class SumNoise:
    """Noise in every sum.

    clip_norm: of a site's change. share: standard deviation of each site's noise, in steps of the grid. least: sites
    whose shares together are the noise that was asked for.
    """

    clip_norm: float
    share: int
    least: int

    def cost(self, step: float, values: int) -> float:
        """What one sum costs a site, whatever its data: the ρ of concentrated privacy, on a grid of this step."""
        # Two changes that are clipped differ by twice the norm at most.
        return summed_cost(self.least, self.share, 2.0 * most_reach(self.clip_norm, step, values), values)


@dataclass(frozen=True, slots=True)
class Secure:
    """How a run's sums are made.

    grid: of the values, with room for everybody who may be asked in a round. most_examples: N. least_cohort: sites
    that a sum is of at least. threshold: sites that must stay, a number or a share; None for more than two thirds.
    scales: of the grid's step in each round, 1 in rounds that have none.
    """

    grid: Grid
    most_examples: int = 10_000
    least_cohort: int = 3
    threshold: int | float | None = None
    noise: SumNoise | None = None
    scales: tuple[float, ...] = ()

    def grid_of(self, round: int) -> Grid:
        """The grid of a round."""
        scale = self.scales[round - 1] if 1 <= round <= len(self.scales) else 1.0
        return self.grid if scale == 1.0 else replace(self.grid, step=scale * self.grid.step)

    def threshold_of(self, sites: int) -> int:
        """Sites that must stay to the end of a sum that so many begin; more than there are where they are too few."""
        asked = self.threshold
        if asked is None:
            asked = least_threshold(sites)
        elif isinstance(asked, float):
            asked = math.ceil(asked * sites - 1e-9)  # 0.55 · 20 is 11.000000000000002
        return max(asked, sites // 2 + 1, self.least_cohort)

    def weight(self, examples: int, weighting: str) -> int:
        """n_k."""
        return 1 if weighting == "uniform" else min(max(examples, 1), self.most_examples)

    def largest(self, weighting: str) -> int:
        """N."""
        return 1 if weighting == "uniform" else self.most_examples

    def digits(self, weighting: str) -> int:
        """Integers that a weight takes: as many as it has digits to a base that the grid has room for."""
        count, reached = 1, self.grid.most
        while reached < self.largest(weighting):
            count, reached = count + 1, (reached + 1) * (self.grid.most + 1) - 1
        return count
