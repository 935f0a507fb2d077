"""A weighted sum of products, Σ w_k B_k A_k, built up one client at a time in factored form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fedloom.errors import ConfigError, ShapeError
from fedloom.lora.lowrank.spectrum import Wanted
from fedloom.lora.lowrank.stack import Stack
from fedloom.lora.lowrank.truncation import Truncation, truncate_stack
from fedloom.lora.pair import LoraPair

HELD_RANK = 512
"""A sum up to this stacked rank keeps its terms as they came; a larger one may be recompressed."""


def streaming_cap(rank: int) -> int:
    """The cap for sums of which `rank` components are wanted: exact up to a stacked rank of at least 1024."""
    return max(HELD_RANK, 4 * rank)


class ProductSum:
    """Σ w_k B_k A_k of one module of `shape` (m, n), in memory that does not grow with the number of clients.

    The pairs are held, not copied: leave their tensors unchanged until the sum is no longer used. `add_later` holds
    what they are made of instead, makes them while the sum is worked on, and counts as the rank that takes as much
    memory. Where the stacked
    rank exceeds 2 min(m, n), the pairs are recompressed to rank min(m, n), which loses nothing but rounding. With a
    `cap`, pairs whose stacked rank exceeds 2 cap are recompressed to the leading `cap` components. That loss adds up in
    `lost`, and `truncate` counts it in the energy that it reports as lost.
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
        self._widest = 0
        self._taken = 0.0  # the rank that takes as much memory as what is held
        self._terms: list[tuple[Callable[[], LoraPair], float]] = []

    def add(self, pair: LoraPair, weight: float) -> None:
        """Add weight · B A. Raises ShapeError where the pair is of another module's shape."""
        self._check(pair.shape)
        self._widest = max(self._widest, pair.rank)
        for first in range(0, pair.rank, self.limit):
            piece = LoraPair(pair.A[first : first + self.limit], pair.B[:, first : first + self.limit])
            # Twice the limit: each recompression then makes room for as much again, so the cost per client is bounded.
            self._hold(partial(_same, piece), piece.rank, piece.rank, weight)

    def add_later(
        self, read: Callable[[], LoraPair], shape: tuple[int, int], rank: int, size: int, weight: float
    ) -> None:
        """`add` of the pair of this shape and rank that `read` gives: it is read anew whenever it is needed.

        size: bytes of what it is read from.
        """
        self._check(shape)
        if rank > self.limit:
            self.add(read(), weight)
            return
        self._widest = max(self._widest, rank)
        self._hold(read, rank, min(size / (4 * sum(shape)), rank), weight)

    def _hold(self, read: Callable[[], LoraPair], rank: int, taken: float, weight: float) -> None:
        if self._taken + taken > 2 * self.limit:
            self._recompress()
        self._terms.append((read, weight))
        self.rank += rank
        self._taken += taken

    def _check(self, shape: tuple[int, int]) -> None:
        if shape != self.shape:
            raise ShapeError(f"a pair of shape {shape} cannot be added to a sum of shape {self.shape}")

    def factors(self) -> LoraPair:
        """One pair whose product is the sum so far."""
        return self._stack().pair()

    def truncate(self, *, rank: int | None = None, energy: float | None = None) -> Truncation:
        """The leading singular components of the sum; see `truncation.truncate`."""
        cut = truncate_stack(self._stack(), Wanted(rank, energy, expected=self._widest))
        return cut if not self.lost else replace(cut, lost_energy=self._lost_energy(cut))

    def _stack(self) -> Stack:
        return Stack(self.shape, tuple((read(), weight) for read, weight in self._terms))

    def _recompress(self) -> None:
        cut = truncate_stack(self._stack(), Wanted(rank=self.limit))
        self.lost += (cut.lost_energy * cut.energy) ** 0.5
        self._terms = [(partial(_same, cut.pair), 1.0)]
        self.rank = cut.pair.rank
        self._taken = self.rank

    def _lost_energy(self, cut: Truncation) -> float:
        """Upper bound: the norm left out now and the norms left out before, over the norm of what is there."""
        left = cut.lost_energy**0.5 + self.lost / cut.energy**0.5 if cut.energy else 1.0
        return min(left**2, 1.0)


def _same(pair: LoraPair) -> LoraPair:
    return pair
