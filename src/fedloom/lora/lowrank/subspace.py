"""The leading left directions of Σ w_k (F + ΔF_k)(G + ΔG_k)ᵀ, without a matrix that grows with the number of clients.

Products with the sum cost one dense product with F and G each, and a sparse one with every change: linear in clients,
where the Gram matrices of all pairs of clients cost its square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.lora.lowrank.gram import gram, quick_gram
from fedloom.lora.lowrank.leading import OVERSAMPLING
from fedloom.lora.lowrank.sparse import TallChange, project, spread

MAX_STEPS = 6
"""Beyond so many steps there is no gap to speak of behind the components wanted, and Gram matrices decide."""
MAX_TURN = 1e-10
"""Largest squared error of the leading part, over the first energy that is left out."""
_ROWS = 1024
"""Rows of a factor that are converted at a time."""
_ROUNDING = 4e-7
"""Energies below this share of the largest are rounding, in the steps of float32."""


@dataclass(frozen=True, eq=False, slots=True)
class Side:
    """A tall factor (d × r, float32, contiguous) and every client's change of it."""

    factor: Tensor
    changes: Sequence[TallChange]

    def mean(self, weights: Sequence[float]) -> Tensor:
        """Σ w_k of the changed factors."""
        total = self.factor * sum(weights)
        one = torch.eye(self.factor.shape[1], device=total.device)
        for change, weight in zip(self.changes, weights, strict=True):
            spread(total, change, weight * one)
        return total

    def seen_by(self, basis: Tensor) -> list[Tensor]:
        """(F + ΔF_k)ᵀ @ basis of every client, r × q, float64; for a basis of float32 good to about 1e-7."""
        quick = basis.dtype == torch.float32
        pairs = zip(torch.split(basis, _ROWS), torch.split(self.factor, _ROWS), strict=True)
        own = torch.stack([(rows.T @ own.to(rows.dtype)).double() for rows, own in pairs]).sum(0)
        return [(own + project(basis, change, quick=quick)).T for change in self.changes]

    def spread(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Σ (F + ΔF_k) @ piece_k, d × q."""
        whole = torch.stack(list(pieces)).sum(0).to(dtype)
        total = self.factor.new_empty(self.factor.shape[0], whole.shape[1], dtype=dtype)
        for rows, out in zip(torch.split(self.factor, _ROWS), torch.split(total, _ROWS), strict=True):
            torch.mm(rows.to(dtype), whole, out=out)
        for change, piece in zip(self.changes, pieces, strict=True):
            spread(total, change, piece)
        return total


def leading_left(left: Side, right: Side, weights: Sequence[float], rank: int) -> tuple[Tensor, Tensor] | None:
    """(X, S⁻¹), d × rank and rank × rank, float64: X S⁻¹ Xᵀ is the projection on the leading left directions.

    None where they stand out too little from those behind them.

    Subspace iteration with Rayleigh–Ritz (Halko, Martinsson & Tropp 2011, §4.5). It begins with what is nearly the
    answer, the mean of the right factors, since W is the product of the two means and the covariance of the changes. A
    Ritz vector with the residual ρ, and a gap to the energies behind, is turned by ρ / gap; a last product, in float64,
    turns it back by λ_{rank+1} / λ. The iteration ends when what is left of the error is below MAX_TURN.
    """
    size = right.factor.shape[0]
    generator = torch.Generator().manual_seed(size)
    # Beside the mean some random directions, for what the mean misses and for a faster fall behind the last wanted one.
    extra = torch.randn(size, OVERSAMPLING, generator=generator).to(right.factor)
    image = _times(left, right, weights, torch.cat([right.mean(weights), extra], dim=1))
    for _ in range(MAX_STEPS):
        basis = torch.linalg.qr(image).Q.contiguous()
        del image  # here and below: what is not needed any more is as large as the factor
        seen = _times(right, left, weights, basis)
        energies, mixing = (part.flip(-1) for part in torch.linalg.eigh(quick_gram(seen)))
        basis, seen = basis @ mixing.float(), seen @ mixing.float()
        image = _times(left, right, weights, seen)
        rest = basis.mul_(-energies.float()).add_(image)
        residuals = torch.linalg.vector_norm(rest, dim=0).double().square()
        del basis, rest
        if not bool(torch.isfinite(residuals).all()) or not float(energies[0]) > 0.0:
            return None
        if _turned_back(energies, residuals, rank) <= MAX_TURN:
            del image
            return _projection(left, right, weights, seen[:, :rank] / energies[:rank].float())
    return None


def _projection(left: Side, right: Side, weights: Sequence[float], seen: Tensor) -> tuple[Tensor, Tensor]:
    """X = W x in float64, whose columns are nearly orthonormal, and the inverse of XᵀX."""
    exact = _times(left, right, weights, seen.double())
    return exact, torch.cholesky_inverse(torch.linalg.cholesky(gram(exact.T)))


def _times(left: Side, right: Side, weights: Sequence[float], x: Tensor) -> Tensor:
    """W x."""
    seen = right.seen_by(x)
    return left.spread([weight * piece for weight, piece in zip(weights, seen, strict=True)], x.dtype)


def _turned_back(energies: Tensor, residuals: Tensor, rank: int) -> float:
    """Σ (ρ_i / gap_i)² λ_{rank+1} / λ_i; infinite without a gap."""
    behind = energies[rank].clamp_min(_ROUNDING * float(energies[0]))
    gap = energies[:rank] - behind - residuals[rank].sqrt()
    return float((residuals[:rank] / gap.clamp_min(0.0).square() * behind / energies[:rank]).sum())
