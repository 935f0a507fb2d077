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

    The factors are stacked, A and Bᵀ row under row. Beyond a stacked rank of 2 min(m, n) they are recompressed to
    min(m, n) at most, which loses nothing but rounding. With a `cap` they are recompressed to the leading `cap`
    components beyond a stacked rank of 2 cap: what that loses adds up in `lost` and is part of the energy that
    `truncate` reports as lost.
    """

    def __init__(self, shape: tuple[int, int], *, cap: int | None = None) -> None:
        if cap is not None and cap < 1:
            raise ConfigError(f"cap is {cap}: expected a rank of at least 1, or None for no loss")
        self.shape = shape
        self.limit = min(cap or min(shape), min(shape))
        self.lost = 0.0
        """Bound on the Frobenius norm of what recompression has left out, the sum of its steps."""
        self.rank = 0
        """Stacked rank held at present."""
        self._capped = cap is not None
        self._rows_a = torch.empty(0, shape[1])
        self._rows_b = torch.empty(0, shape[0])

    def add(self, pair: LoraPair, weight: float) -> None:
        """Add weight · B A. Raises ShapeError where the pair is of another module's shape."""
        if pair.shape != self.shape:
            raise ShapeError(f"a pair of shape {pair.shape} cannot be added to a sum of shape {self.shape}")
        for first in range(0, pair.rank, self.limit):
            self._append(pair.A[first : first + self.limit], pair.B.T[first : first + self.limit], weight)

    def factors(self) -> LoraPair:
        """One pair whose product is the sum so far; its factors are views that the next `add` may overwrite."""
        return LoraPair(self._rows_a[: self.rank], self._rows_b[: self.rank].T)

    def truncate(self, *, rank: int | None = None, energy: float | None = None) -> Truncation:
        """The leading singular components of the sum; see `truncation.truncate`."""
        cut = truncate(self.factors(), rank=rank, energy=energy)
        return cut if not self.lost else replace(cut, lost_energy=self._lost_energy(cut))

    def _append(self, a: Tensor, bt: Tensor, weight: float) -> None:
        if self.rank + a.shape[0] > 2 * self.limit:
            self._recompress()
        last = self.rank + a.shape[0]
        dtype = torch.promote_types(working_dtype(a, bt), self._rows_a.dtype)
        self._rows_a = self._reserved(self._rows_a, last, a, dtype)
        self._rows_b = self._reserved(self._rows_b, last, a, dtype)
        self._rows_a[self.rank : last] = a
        torch.mul(bt.to(dtype), weight, out=self._rows_b[self.rank : last])
        self.rank = last

    def _reserved(self, rows: Tensor, needed: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The buffer with room for `needed` rows: at once for all there can be under a cap, else doubled as needed."""
        if needed <= rows.shape[0] and rows.dtype == dtype:
            return rows
        room = 2 * self.limit if self._capped else min(max(needed, 2 * rows.shape[0]), 2 * self.limit)
        larger = torch.empty(max(room, rows.shape[0]), rows.shape[1], dtype=dtype, device=like.device)
        larger[: self.rank] = rows[: self.rank]
        return larger

    def _recompress(self) -> None:
        cut = truncate(self.factors(), rank=self.limit)
        self.lost += (cut.lost_energy * float(cut.singular_values.square().sum())) ** 0.5
        self.rank = cut.pair.rank
        self._rows_a[: self.rank] = cut.pair.A
        self._rows_b[: self.rank] = cut.pair.B.T

    def _lost_energy(self, cut: Truncation) -> float:
        """Upper bound: the norm left out now and the norms left out before, over the norm of what is there."""
        there = float(cut.singular_values.square().sum())
        left = cut.lost_energy**0.5 + self.lost / there**0.5 if there else 1.0
        return min(left**2, 1.0)
