"""The pseudo-inverse of a tall factor, kept as two small pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.lowrank.gram import gram

GRAM_LIMIT = 1e-8
"""Smallest ratio of eigenvalues of FᵀF down to which it is trusted: cond(F) = 1e4. Beyond that, QR in float64."""


@dataclass(frozen=True, eq=False, slots=True)
class Inverse:
    """F⁺ = left @ basisᵀ of a d × r factor F.

    gram: FᵀF. left: r × r, float64, as are gram and shrink. basis: d × r, F itself or, in float64, an orthonormal basis
    of it. shrink: F⁺F, the identity but for cut-off and ridge. kept: number of singular values inverted. condition:
    largest over smallest of them, 0 where there is none.
    """

    gram: Tensor
    left: Tensor
    basis: Tensor
    shrink: Tensor
    kept: int
    condition: float


def inverse(factor: Tensor, ridge: float, rcond: float) -> Inverse:
    """σ becomes σ / (σ² + ridge σ_max²), or 0 where σ ≤ rcond σ_max. A factor of zeros has the inverse zero.

    The Gram matrix squares the condition number, so it serves where that is small or the ridge bounds it.
    """
    gram_factor = gram(factor.T)
    energies, vectors = torch.linalg.eigh(gram_factor)
    top = energies[-1] if energies.numel() else energies.sum()
    if bool(energies[:1].sum() > GRAM_LIMIT * top) or ridge > GRAM_LIMIT:
        sigma, basis, left_vectors = energies.clamp_min(0.0).sqrt(), factor, None
    else:
        basis, upper = torch.linalg.qr(factor.double())
        left_vectors, sigma, vt = torch.linalg.svd(upper)
        vectors = vt.T
    largest = sigma.max() if sigma.numel() else sigma.sum()
    keep = sigma > rcond * largest
    kept = int(keep.sum())
    damped = torch.where(keep, 1.0 / (sigma.square() + ridge * largest.square()), 0.0)
    left = (vectors * damped) @ vectors.T if left_vectors is None else (vectors * damped * sigma) @ left_vectors.T
    if kept == sigma.numel() and ridge == 0.0:
        shrink = torch.eye(kept, dtype=torch.float64, device=factor.device)
    else:
        shrink = (vectors * damped * sigma.square()) @ vectors.T
    condition = float(largest / sigma[keep].min()) if kept else 0.0
    return Inverse(gram_factor, left, basis, shrink, kept, condition)
