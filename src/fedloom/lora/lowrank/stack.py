"""A weighted sum of products kept as its terms: nothing is copied until a kernel asks, and then in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.lora.pair import LoraPair

_CHUNK_ROWS = 1536
"""Rows copied side by side at a time: few enough that the copy is still in the cache when it is used."""
_CHUNK_BYTES = 2**22
"""Bytes of such a copy at most: in a stack of high rank it has fewer rows."""


@dataclass(frozen=True, eq=False, slots=True)
class Stack:
    """Σ w_k B_k A_k of one `shape` (m, n) as [B_1 | B_2 | …] diag(w) [A_1; A_2; …], of stacked rank R = Σ r_k.

    The tensors of the pairs are held, not copied.
    """

    shape: tuple[int, int]
    terms: tuple[tuple[LoraPair, float], ...]

    @property
    def rank(self) -> int:
        """R."""
        return sum(pair.rank for pair, _ in self.terms)

    @property
    def dtype(self) -> torch.dtype:
        """float64 where a factor is, else float32."""
        factors = (factor for pair, _ in self.terms for factor in (pair.A, pair.B))
        return torch.float64 if any(factor.dtype == torch.float64 for factor in factors) else torch.float32

    def weights(self, like: Tensor) -> Tensor:
        """w, one for each of the R columns."""
        ranks = torch.tensor([pair.rank for pair, _ in self.terms])
        return torch.tensor([weight for _, weight in self.terms]).repeat_interleave(ranks).to(like)

    def chunks(self, part: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """Row blocks of the tall factor without the weights, in turn: of [A_1ᵀ | A_2ᵀ | …] (n × R) or [B_1 | …]."""
        step = max(min(_CHUNK_BYTES // (dtype.itemsize * max(self.rank, 1)), _CHUNK_ROWS), 256)
        for begin in range(0, self.shape[0 if part == "B" else 1], step):
            if part == "A":
                yield torch.cat([pair.A[:, begin : begin + step] for pair, _ in self.terms]).to(dtype).T
            else:
                yield torch.cat([pair.B[begin : begin + step] for pair, _ in self.terms], dim=1).to(dtype)

    def pair(self) -> LoraPair:
        """One pair with the same product: copies of the factors, the weights folded into B."""
        dtype = self.dtype
        if not self.terms:
            return LoraPair(torch.zeros(0, self.shape[1]), torch.zeros(self.shape[0], 0))
        a = torch.cat([pair.A.to(dtype) for pair, _ in self.terms])
        return LoraPair(a, torch.cat([pair.B.to(dtype) * weight for pair, weight in self.terms], dim=1))
