"""Real numbers as integers modulo 2^bits: a grid that every site rounds to, so that sums are exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import SecureSumError
from fedloom.secagg.masks import Integers, number_type


@dataclass(frozen=True, slots=True)
class Grid:
    """Multiples of `step` for `sites` summands of `bits` bits; what a site sends is cut to ± `reach`.

    Raises SecureSumError where the bits leave no room for one step of every site.
    """

    step: float
    bits: int
    sites: int

    def __post_init__(self) -> None:
        if self.most < 1:
            raise SecureSumError(
                f"{self.bits} bits cannot hold a sum of {self.sites} sites: expected at least "
                f"{(2 * self.sites + 1).bit_length()}"
            )
        if not 0.0 < self.step < float("inf"):
            raise SecureSumError(f"a grid of step {self.step}: expected a finite number above 0")

    @property
    def most(self) -> int:
        """The largest number of steps that a site may send: so many of all sites together do not wrap around."""
        return int((2 ** (self.bits - 1) - 1) // self.sites)

    @property
    def reach(self) -> float:
        """The largest magnitude that a site can send."""
        return self.most * self.step

    @classmethod
    def reaching(cls, largest: float, bits: int, sites: int) -> Grid:
        """The finest grid on which a site can send magnitudes up to `largest`."""
        return cls(largest / cls(1.0, bits, sites).most, bits, sites)

    def to_integers(self, values: NDArray[np.floating], draw: np.random.Generator) -> Integers:
        """The values on the grid: rounded up as often as they lie above a multiple, so that the mean error is zero."""
        scaled = np.asarray(values, np.float64) / self.step
        if not np.isfinite(scaled).all():
            raise SecureSumError("a vector with NaN or infinity cannot be added up")
        steps = np.clip(np.floor(scaled + draw.random(scaled.shape)), -self.most, self.most)
        return steps.astype(np.int64).astype(number_type(self.bits))  # two's complement, modulo 2^bits in the end

    def to_steps(self, total: Integers) -> NDArray[np.int64]:
        """Integers modulo 2^bits as numbers of steps, with their signs."""
        low = total.astype(np.int64) & (2**self.bits - 1)
        return np.asarray(np.where(low >= 2 ** (self.bits - 1), low - 2**self.bits, low), np.int64)

    def to_values(self, total: Integers) -> NDArray[np.float64]:
        """The sum as real numbers."""
        return np.asarray(self.to_steps(total) * self.step, np.float64)
