"""The leading singular components of a product from Gram matrices that are known to an error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedloom.lora.lowrank.gram import Core, core

OVERSAMPLING = 16
"""Directions beyond the rank: they make the last wanted one converge as fast as the spectrum falls behind them."""
QUICK_STEPS = 2
"""First steps, in float32. The steps after them measure how good the subspace is and cost four times as much."""
PAIRED_RANK = 256
"""Up to this stacked rank Gram matrices cost less than products with the sum itself."""
MAX_STEPS = 8
"""Beyond so many steps all components cost less."""
MAX_EXCESS = 1e-8
"""Largest share of the energy left out that a better subspace could still gain."""
SMALLEST_TAIL = 1e-8
"""Where the share of energy left out is smaller, a difference of two sums is rounding: all components are computed."""


def subspace_pays(stacked: int, rank: int) -> bool:
    """Whether a subspace of this rank is small enough in a core of R × R."""
    # A step costs 4 R² (rank + 16) operations, all components several R³: above a third of R steps do not pay.
    return 3 * (rank + OVERSAMPLING) <= stacked


def core_holding_energy(gram_left: Tensor, gram_right: Tensor, energy: float, error: float) -> Core | None:
    """The first components of W = L Rᵀ that hold the share `energy` of all, from LᵀL and RᵀR.

    None where the error of these, see `leading_core`, could cost more than MAX_EXCESS of the energy left out.
    """
    whole = core(gram_left, gram_right)
    if whole is None:
        return None
    tails = whole.energies.flip(0).cumsum(0).flip(0)
    rank = int((tails > (1.0 - energy) * tails[0]).sum())
    noise = _coupling(gram_left, gram_right, error)
    if rank == tails.numel() or not _trusted(whole.energies, rank, float(tails[rank]), error, noise):
        return None
    return Core(whole.energies[:rank], float(tails[rank]), noise, whole.root, whole.vectors[:, :rank])


def leading_core(gram_left: Tensor, gram_right: Tensor, rank: int, error: float) -> Core | None:
    """The first `rank` components of W = L Rᵀ from LᵀL and RᵀR; None where all are needed to be sure.

    error: of either Gram matrix, in Frobenius norm over its own. Spread over the R directions it couples one direction
    with the others by δ = error ‖LᵀL‖ ‖RᵀR‖ / √R.

    Subspace iteration with Rayleigh–Ritz on WᵀW, whose vectors R y are held by y alone (Halko, Martinsson & Tropp 2011,
    §4.5): a step costs 4 R² (rank + 16) operations in float64. To second order a rotation of the subspace can still
    gain Σ ρ_i² / (λ_i − λ_{rank+1}), ρ_i = ‖WᵀW v_i − λ_i v_i‖. It ends when that is below MAX_EXCESS of the energy
    left out, and gives up where MAX_STEPS would not do, as on a flat spectrum, where δ in the place of ρ_i is too much,
    and where there is next to no tail.
    """
    total = float((gram_left * gram_right).sum())
    size = gram_left.shape[0]
    noise = _coupling(gram_left, gram_right, error)
    generator = torch.Generator().manual_seed(size)
    y = torch.randn(size, rank + OVERSAMPLING, generator=generator).to(gram_left.device)
    quick_left, quick_right = (_unit(gram).float() for gram in (gram_left, gram_right))
    # The first steps only turn the basis towards the leading directions: their rounding is forgotten by the next step,
    # and float32 does them four times as fast. QR keeps the columns apart, which powers would make parallel.
    for _ in range(QUICK_STEPS):
        y = torch.linalg.qr(quick_left @ (quick_right @ y)).Q
    y = y.double()
    # A column y stands for the direction R y of W's rows. `seen` = RᵀR y gives lengths and angles of such directions
    # without R: (R y)ᵀ(R y') = yᵀ RᵀR y'. So nothing here has m or n rows, only R.
    seen = gram_right @ y
    excess = float("inf")
    for step in range(1, MAX_STEPS + 1):
        image = gram_left @ seen  # WᵀW (R y) = R (LᵀL RᵀR y): the coordinates of the image
        found = _ritz(y.T @ seen, seen.T @ image)
        if found is None:
            return None
        energies, mixing = found
        y, seen, image = y @ mixing, seen @ mixing, image @ mixing
        # Beside the Ritz vectors themselves, combined from products that are there: only this one is a new product.
        seen_image = gram_right @ image
        residuals = ((image - y * energies) * (seen_image - seen * energies)).sum(0)
        tail = total - float(energies[:rank].sum())
        # The tail is total − Σ energies. Where it is next to nothing, that difference is rounding and says nothing.
        if step > 1 and not tail > max(SMALLEST_TAIL, 100 * error) * total:
            return None
        previous, excess = excess, possible_gain(energies, residuals, rank) / max(tail, SMALLEST_TAIL * total)
        if excess <= MAX_EXCESS:
            if not _trusted(energies, rank, tail, error, noise):
                return None
            first = energies[:rank]
            return Core(first, tail, noise, y[:, :rank], torch.diag(first.sqrt()))
        # Convergence is linear: at this rate of fall, would the steps that are left do? If not, all components are
        # cheaper than steps that end in the same answer.
        if step > 2 and not excess * (excess / previous) ** (MAX_STEPS - step) <= MAX_EXCESS:
            return None
        # The image is the next basis; divided by the energies its columns keep their lengths.
        y, seen = image / energies, seen_image / energies
    return None


def _unit(gram: Tensor) -> Tensor:
    """The matrix divided by its largest diagonal element, so that powers of it overflow no type."""
    return gram / gram.diagonal().max().clamp_min(torch.finfo(gram.dtype).tiny)


def _coupling(gram_left: Tensor, gram_right: Tensor, error: float) -> float:
    """δ, see `leading_core`."""
    norms = torch.linalg.matrix_norm(gram_left) * torch.linalg.matrix_norm(gram_right)
    return error * float(norms) / math.sqrt(gram_left.shape[0])


def _trusted(energies: Tensor, rank: int, tail: float, error: float, noise: float) -> bool:
    """Whether δ (`noise`) costs next to nothing of what `rank` components leave out, and hides none of them."""
    total = float(energies[:rank].sum()) + tail
    if not tail > max(SMALLEST_TAIL, 100 * error) * total:
        return False
    unsure = possible_gain(energies, torch.full_like(energies, noise**2), rank) / tail
    return unsure <= MAX_EXCESS and float(energies[rank - 1]) > 100 * noise


def possible_gain(energies: Tensor, residuals: Tensor, rank: int) -> float:
    """Σ ρ_i² / (λ_i − λ_{rank+1}) of the first `rank` Ritz values and squared residuals; infinite without a gap."""
    error = residuals[rank].clamp_min(0.0).sqrt()
    gap = energies[:rank] - energies[rank] - error
    return float((residuals[:rank].clamp_min(0.0) / gap.clamp_min(0.0)).sum())


def _ritz(lengths: Tensor, image: Tensor) -> tuple[Tensor, Tensor] | None:
    """Ritz values, descending, and the combinations of the basis that they belong to; None for a dependent basis."""
    root, info = torch.linalg.cholesky_ex(lengths)
    if int(info):
        return None
    half = torch.linalg.solve_triangular(root, image, upper=False)
    energies, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))
    mixing = torch.linalg.solve_triangular(root.T, vectors.flip(1), upper=True)
    return energies.flip(0), mixing
