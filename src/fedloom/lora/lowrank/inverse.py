"""The pseudo-inverse of a tall factor, kept as two small pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.lora.lowrank.gram import gram, quick_gram

GRAM_LIMIT = 1e-8
"""Smallest ratio of eigenvalues of FᵀF down to which it is trusted: cond(F) = 1e4. Beyond that, QR in float64."""
QUICK_AMPLIFICATION = 64.0
"""Largest `Inverse.amplification` for which products in float32 do: cond(F) = 8, or any with a ridge from 1/63."""
QUICK_LIMIT = 1e-5
"""Smallest ratio of eigenvalues that a quick Gram matrix tells from zero with certainty."""


@dataclass(frozen=True, eq=False, slots=True)
class Inverse:
    """F⁺ = left @ basisᵀ of a d × r factor F.

    left: r × r, float64, as is shrink. basis: d × r, F itself or, in float64, an orthonormal basis of it. shrink: F⁺F,
    the identity but for cut-off and ridge. kept: number of singular values inverted. condition: largest over smallest
    of them, 0 where there is none. amplification: factor by which
    a relative error of FᵀF or FᵀX grows in F⁺X.
    """

    left: Tensor
    basis: Tensor
    shrink: Tensor
    kept: int
    condition: float
    amplification: float

    @property
    def quick(self) -> bool:
        """Whether products with `basis` may be summed in float32."""
        return self.amplification <= QUICK_AMPLIFICATION


def inverse(factor: Tensor, ridge: float, rcond: float, gram_factor: Tensor | None = None) -> Inverse:
    """σ becomes σ / (σ² + ridge σ_max²), or 0 where σ ≤ rcond σ_max. A factor of zeros has the inverse zero.

    gram_factor: FᵀF in float64, where it is known. Otherwise a quick Gram matrix is tried first; it serves where the
    inverse amplifies its error little. Any Gram matrix squares the condition number, so it serves only where that is
    small or the ridge bounds it. Elsewhere QR in float64 takes over.
    """
    if gram_factor is None:
        found = _benign(factor, ridge, rcond)
        if found is not None:
            return found
        gram_factor = gram(factor.T)
    energies, vectors = torch.linalg.eigh(gram_factor)
    top = float(energies[-1]) if energies.numel() else 0.0
    if top and (float(energies[0]) > GRAM_LIMIT * top or ridge > GRAM_LIMIT):
        return _inverse(energies.clamp_min(0.0).sqrt(), vectors, None, factor, ridge, rcond)
    size, rank = factor.shape
    # Rows of zeros make the triangle square where the rank exceeds the module's size; they add nothing to the products.
    tall = torch.nn.functional.pad(factor.double(), (0, 0, 0, max(rank - size, 0)))
    # (d, r) and (r, r): QR does not square the condition number.
    basis, upper = torch.linalg.qr(tall)
    left_vectors, sigma, vt = torch.linalg.svd(upper)
    return _inverse(sigma, vt.T, left_vectors, basis[:size], ridge, rcond)


def _benign(factor: Tensor, ridge: float, rcond: float) -> Inverse | None:
    """By Cholesky of a quick Gram matrix; None unless that is `quick`, and all singular values are inverted."""
    gram_factor = quick_gram(factor)
    size = gram_factor.shape[0]
    energies = torch.linalg.eigvalsh(gram_factor).tolist()
    if not size or not energies[0] > max(QUICK_LIMIT, rcond**2) * energies[-1]:
        return None
    amplification = energies[-1] / (energies[0] + ridge * energies[-1])
    if amplification > QUICK_AMPLIFICATION:
        return None
    one = torch.eye(size, dtype=torch.float64, device=factor.device)
    left = torch.cholesky_inverse(torch.linalg.cholesky(gram_factor.add(one, alpha=ridge * energies[-1])))
    shrink = left @ gram_factor if ridge else one
    return Inverse(left, factor, shrink, size, (energies[-1] / energies[0]) ** 0.5, amplification)


def _inverse(
    sigma: Tensor, vectors: Tensor, left_vectors: Tensor | None, basis: Tensor, ridge: float, rcond: float
) -> Inverse:
    """From the singular values σ of F, in any order, and its right singular vectors.

    left_vectors: those of the triangle where `basis` is orthonormal, None where `basis` is F.
    """
    values = sigma.tolist()
    largest = max(values, default=0.0)
    inverted = [value for value in values if value > rcond * largest]
    shares = [1.0 / (v * v + ridge * largest**2) if v > rcond * largest else 0.0 for v in values]
    damped = vectors * sigma.new_tensor(shares)
    left = damped @ vectors.T if left_vectors is None else (damped * sigma) @ left_vectors.T
    if len(inverted) == len(values) and ridge == 0.0:
        shrink = torch.eye(len(values), dtype=torch.float64, device=basis.device)
    else:
        shrink = (damped * sigma.square()) @ vectors.T
    condition = largest / min(inverted) if inverted else 0.0
    return Inverse(left, basis, shrink, len(inverted), condition, max(shares, default=0.0) * largest**2)
