"""Singular components of W = B A from the factors: three algorithms with one face.

Each takes A (R × n) and B (m × R) and gives a Spectrum, or None where its own check says that another one is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedloom.lora import LoraPair
from fedloom.lowrank.gram import EPS, Core, core, gram

OVERSAMPLING = 16
MAX_STEPS = 8
MAX_EXCESS = 1e-8
_CHUNK = 1024


@dataclass(frozen=True, eq=False, slots=True)
class Spectrum:
    """energies: σ², descending, float64. beyond: Σσ² of what was not computed. floor: energies up to it are zero.

    expand(p): the leading p components as B = U diag(σ), A = Vᵀ, signs not yet fixed.
    """

    energies: Tensor
    beyond: float
    floor: float
    expand: Callable[[int], LoraPair]


def working_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """float64 where a factor is, else float32."""
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def floor(top: float, noise: float, dtype: torch.dtype) -> float:
    """The energy that a product of factors of this type may have by rounding alone."""
    return max(noise, top * (4 * torch.finfo(dtype).eps) ** 2)


def by_gram(a: Tensor, b: Tensor, rank: int | None) -> Spectrum | None:
    """Two R × R Gram matrices in float64 and one eigen-decomposition. For float32 factors and R < min(m, n)."""
    gram_a = gram(a)
    found = core(gram(b.T), gram_a)
    if found is None:
        return None
    low = floor(float(found.energies[0]), found.noise, torch.float32)
    return Spectrum(found.energies, 0.0, low, partial(_expand_gram, a, b, gram_a, found))


def _expand_gram(a: Tensor, b: Tensor, gram_a: Tensor, found: Core, keep: int) -> LoraPair:
    """V in float64, so that its rows stay orthonormal where σ is small; W V = B (A V) in float32."""
    right = found.right(keep) / found.energies[:keep].sqrt()
    vt = a.new_empty(keep, a.shape[1], dtype=torch.float32)
    for begin in range(0, a.shape[1], _CHUNK):
        vt[:, begin : begin + _CHUNK] = right.T @ a[:, begin : begin + _CHUNK].double()
    return LoraPair(vt, b.float() @ (gram_a @ right).float())


def by_qr(a: Tensor, b: Tensor, rank: int | None) -> Spectrum:
    """QR of both factors and an SVD of the core, all in float64: for float64 factors, and where Gram gives up."""
    dtype = working_dtype(a, b)
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    noise = float(torch.linalg.matrix_norm(rb) * torch.linalg.matrix_norm(ra)) * 16 * EPS

    def expand(keep: int) -> LoraPair:
        return LoraPair((vt[:keep] @ qa.T).to(dtype), (qb @ (u[:, :keep] * s[:keep])).to(dtype))

    return Spectrum(s * s, 0.0, floor(float(s[0]) ** 2, noise**2, dtype), expand)


def by_randomised(a: Tensor, b: Tensor, rank: int | None) -> Spectrum | None:
    """Subspace iteration with QR on the implicit product, for R far above the rank. Seeded, so it repeats itself.

    (Halko, Martinsson & Tropp 2011, algorithm 4.4.) After every step the Ritz residuals ρ_i = ‖Wᵀu_i − σ_i v_i‖ tell
    what a better subspace could still gain, to second order Σ ρ_i² σ_i² / (σ_i² − σ²_{rank+1}). It ends when that is
    below MAX_EXCESS of the energy left out, and gives up (None) as soon as it will not get there in MAX_STEPS, as on a
    flat spectrum.
    """
    if rank is None:
        return None
    a, b = a.float(), b.float()
    generator = torch.Generator().manual_seed(a.shape[1])
    v = torch.linalg.qr(torch.randn(a.shape[1], rank + OVERSAMPLING, generator=generator).to(a.device)).Q
    excess = float("inf")
    for step in range(1, MAX_STEPS + 1):
        q, upper = torch.linalg.qr((b @ (a @ v)).double())
        u, s, wt = torch.linalg.svd(upper, full_matrices=False)
        u, v = q @ u, v.double() @ wt.T
        image = (u.float().T @ b) @ a
        previous, excess = excess, _excess(s * s, (image - s[:, None] * v.T).square().sum(1), rank)
        if excess <= MAX_EXCESS:
            return _ritz(a, b, u[:, :rank], s[:rank], v[:, :rank])
        if step > 2 and not excess * (excess / previous) ** (MAX_STEPS - step) <= MAX_EXCESS:
            return None
        v = torch.linalg.qr(image.T).Q
    return None


def _excess(energies: Tensor, residuals: Tensor, rank: int) -> float:
    """What the first `rank` Ritz components may miss of the best, over the energy that is left out at least."""
    gap = energies[:rank] - energies[rank] - residuals[rank]
    gain = (residuals[:rank] * energies[:rank] / gap.clamp_min(0.0)).sum()
    return float(gain / torch.maximum(energies[rank:].sum(), energies[0] * torch.finfo(torch.float32).eps ** 2))


def _ritz(a: Tensor, b: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Spectrum:
    """The components found, and the energy beyond them from what is left of A without its part along V."""
    rest = a - (a @ v.float()) @ v.float().T
    beyond = float((gram(rest, torch.float32).double() * gram(b.T, torch.float32)).sum())

    def expand(keep: int) -> LoraPair:
        return LoraPair(v[:, :keep].T.float().contiguous(), (u[:, :keep] * s[:keep]).float())

    return Spectrum(s * s, max(beyond, 0.0), floor(float(s[0]) ** 2, 0.0, torch.float32), expand)
