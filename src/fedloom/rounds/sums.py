"""How the secure sums of a run are made: the grid of their values, and who must be in one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedloom.noise.accounting import summed_cost
from fedloom.secagg import Grid, least_threshold
from fedloom.secagg.noise import most_reach

SUM = "the sum of the sites"
"""The name under which a sum is averaged. No site can have it: it has spaces."""


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
    """

    grid: Grid
    most_examples: int = 10_000
    least_cohort: int = 3
    threshold: int | float | None = None
    noise: SumNoise | None = None

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
