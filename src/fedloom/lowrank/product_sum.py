"""A weighted sum of products, Σ w_k B_k A_k, built up one client at a time in factored form."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedloom.errors import ConfigError, ShapeError
from fedloom.lora import LoraPair
from fedloom.lowrank.kernels import working_dtype
from fedloom.lowrank.truncation import Truncation, truncate


class ProductSum:
    """Σ w_k B_k A_k of one module of `shape` (m, n), in memory that does not grow with the number of clients.

    The factors are stacked. Beyond a stacked rank of 2 min(m, n) they are recompressed to min(m, n) at most, which
    loses nothing but rounding. With a `cap` they are recompressed to the leading `cap` components beyond a stacked rank
    of 2 cap: what that loses adds up in `lost` and is part of the energy that `truncate` reports as lost.
    """

    def __init__(self, shape: tuple[int, int], *, cap: int | None = None) -> None:
        if cap is not None and cap < 1:
            raise ConfigError(f"cap is {cap}: expected a rank of at least 1, or None for no loss")
        self.shape = shape
        self.limit = min(cap or min(shape), min(shape))
        self.lost = 0.0
        """Bound on the Frobenius norm of what recompression has left out, the sum of its steps."""
        self._a: list[Tensor] = []
        self._b: list[Tensor] = []

    @property
    def rank(self) -> int:
        """Stacked rank held at present."""
        return sum(a.shape[0] for a in self._a)

    def add(self, pair: LoraPair, weight: float) -> None:
        """Add weight · B A. Raises ShapeError where the pair is of another module's shape."""
        if pair.shape != self.shape:
            raise ShapeError(f"a pair of shape {pair.shape} cannot be added to a sum of shape {self.shape}")
        for first in range(0, pair.rank, self.limit):
            rows = slice(first, first + self.limit)
            if self.rank + pair.A[rows].shape[0] > 2 * self.limit:
                self._recompress()
            self._a.append(pair.A[rows])
            self._b.append(pair.B[:, rows].to(working_dtype(pair.A, pair.B)) * weight)

    def factors(self) -> LoraPair:
        """One pair whose product is the sum so far."""
        if not self._a:
            m, n = self.shape
            return LoraPair(torch.zeros(0, n), torch.zeros(m, 0))
        return LoraPair(torch.cat(self._a), torch.cat(self._b, dim=1))

    def truncate(self, *, rank: int | None = None, energy: float | None = None) -> Truncation:
        """The leading singular components of the sum; see `truncation.truncate`."""
        cut = truncate(self.factors(), rank=rank, energy=energy)
        return cut if not self.lost else replace(cut, lost_energy=self._lost_energy(cut))

    def _recompress(self) -> None:
        cut = truncate(self.factors(), rank=self.limit)
        self.lost += (cut.lost_energy * float(cut.singular_values.square().sum())) ** 0.5
        self._a, self._b = [cut.pair.A], [cut.pair.B]

    def _lost_energy(self, cut: Truncation) -> float:
        """Upper bound: the norm left out now and the norms left out before, over the norm of what is there."""
        there = float(cut.singular_values.square().sum())
        left = cut.lost_energy**0.5 + self.lost / there**0.5 if there else 1.0
        return min(left**2, 1.0)
