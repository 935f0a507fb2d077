"""Leading singular components of ΔW = B A, computed from the factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.errors import ConfigError, NumericError
from fedloom.lora import LoraPair
from fedloom.lowrank.kernels import OVERSAMPLING, Spectrum, by_gram, by_qr, by_randomised, working_dtype
from fedloom.lowrank.parallel import over_modules

KERNELS = {"gram": by_gram, "qr": by_qr, "randomised": by_randomised}


@dataclass(frozen=True, eq=False, slots=True)
class Truncation:
    """The leading components of a product, largest first.

    pair: B = U diag(σ), A = Vᵀ with orthonormal rows, of which the element of largest magnitude is positive; float64
    where a factor was, else float32. singular_values: all that were computed, float64, descending. lost_energy: Σσ² of
    what is left out over the Σ of all, 0 … 1. kernel: the algorithm that gave the result.
    """

    pair: LoraPair
    singular_values: Tensor
    lost_energy: float
    kernel: str


def truncate(
    pair: LoraPair, *, rank: int | None = None, energy: float | None = None, kernel: str | None = None
) -> Truncation:
    """The best approximation of B A of at most `rank`, or the least rank that holds the share `energy` of Σσ².

    With neither, or with energy = 1, all that is not zero to rounding. The kernel is chosen by `plan`, unless one is
    named. Raises NumericError where a factor holds NaN or infinity, ConfigError for a rank or energy out of range.
    """
    _check(pair, rank, energy)
    a, b = _folded(pair)
    for name in (
        plan(a.shape[1], b.shape[0], a.shape[0], rank, working_dtype(a, b)) if kernel is None else (kernel, "qr")
    ):
        spectrum = KERNELS[name](a, b, rank) if a.numel() and b.numel() else _nothing(a, b)
        if spectrum is not None:
            return _cut(spectrum, rank, energy, name)
    raise AssertionError("the QR kernel answers always")


def plan(n: int, m: int, stacked: int, rank: int | None, dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels to try, the cheapest first; each but the last checks itself.

    Costs in float32 operations, float64 counting double. Gram: 2 (R² (m + n) + 10 R³), the eigen-decomposition running
    at a third of the speed of products. Randomised, l = rank + 16, four steps and the energy left out:
    16 R l (m + n) + R² (m + n).
    """
    if dtype == torch.float64:
        return ("qr",)
    gram_cost = 2 * (stacked**2 * (m + n) + 10 * stacked**3)
    sketch = (rank or stacked) + OVERSAMPLING
    randomised_cost = (16 * stacked * sketch + stacked**2) * (m + n)
    if rank and sketch < min(stacked, m, n) and randomised_cost < gram_cost:
        return ("randomised", "gram", "qr")
    return ("gram", "qr")


def truncate_all(
    pairs: Mapping[str, LoraPair], *, rank: int | None = None, energy: float | None = None
) -> dict[str, Truncation]:
    """`truncate` for every module, as many at a time as torch may use threads."""
    cuts = over_modules(lambda pair: truncate(pair, rank=rank, energy=energy), pairs.values())
    return dict(zip(pairs, cuts, strict=True))


def _check(pair: LoraPair, rank: int | None, energy: float | None) -> None:
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ConfigError(f"energy is {energy}: expected 0 < energy ≤ 1")
    if rank is not None and rank < 0:
        raise ConfigError(f"rank is {rank}: expected 0 or more")
    for name, factor in (("A", pair.A), ("B", pair.B)):
        if not bool(torch.isfinite(factor.sum())) and not bool(torch.isfinite(factor).all()):
            raise NumericError(f"{name} of a pair of shape {pair.shape} holds NaN or infinity: leave that client out")


def _folded(pair: LoraPair) -> tuple[Tensor, Tensor]:
    """The factors; where R exceeds min(m, n), the product and an identity, which are smaller than they are."""
    a, b = pair.A, pair.B
    m, n = pair.shape
    if pair.rank <= min(m, n):
        return a, b
    dtype = working_dtype(a, b)
    product = b.to(dtype) @ a.to(dtype)
    return (
        (product, torch.eye(m, dtype=dtype, device=a.device))
        if m <= n
        else (torch.eye(n, dtype=dtype, device=a.device), product)
    )


def _nothing(a: Tensor, b: Tensor) -> Spectrum:
    dtype = working_dtype(a, b)
    empty = LoraPair(a.new_zeros(0, a.shape[1], dtype=dtype), b.new_zeros(b.shape[0], 0, dtype=dtype))
    return Spectrum(a.new_zeros(0, dtype=torch.float64), 0.0, 0.0, lambda keep: empty)


def _cut(spectrum: Spectrum, rank: int | None, energy: float | None, kernel: str) -> Truncation:
    energies = spectrum.energies
    tail = energies.flip(0).cumsum(0).flip(0) + spectrum.beyond
    total = float(tail[0]) if tail.numel() else 0.0
    keep = int((energies > spectrum.floor).sum())
    if energy is not None and energy < 1.0:
        keep = min(keep, int((tail > (1.0 - energy) * total).sum()))
    if rank is not None:
        keep = min(keep, rank)
    left = float(tail[keep]) if keep < tail.numel() else spectrum.beyond
    pair = _signed(spectrum.expand(keep))
    return Truncation(pair, energies.sqrt(), left / total if total else 0.0, kernel)


def _signed(pair: LoraPair) -> LoraPair:
    """The element of largest magnitude of every row of A made positive."""
    if not pair.rank:
        return pair
    pivot = pair.A.gather(1, pair.A.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(pivot < 0, -1.0, 1.0).to(pair.A.dtype)
    return LoraPair(pair.A.mul_(sign), pair.B.mul_(sign.T))
