"""How the secure sums of a run are made: the grid of their values, and who must be in one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedloom.secagg import Grid, least_threshold

SUM = "the sum of the sites"
"""The name under which a sum is averaged. No site can have it: it has spaces."""


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
