"""Leading singular components of ΔW = B A, computed from the factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.errors import ConfigError, NumericError
from fedloom.lora.lowrank.kernels import spectrum_by_gram, spectrum_by_qr
from fedloom.lora.lowrank.parallel import EIGEN, map_modules
from fedloom.lora.lowrank.products import spectrum_by_products
from fedloom.lora.lowrank.spectrum import Spectrum, Wanted
from fedloom.lora.lowrank.stack import Stack
from fedloom.lora.pair import LoraPair

KERNELS: Mapping[str, Callable[[Stack, Wanted], Spectrum | None]] = {
    "products": spectrum_by_products,
    "gram": spectrum_by_gram,
    "qr": spectrum_by_qr,
}


@dataclass(frozen=True, eq=False, slots=True)
class Truncation:
    """The leading components of a product, largest first.

    pair: B = U diag(σ), A = Vᵀ with orthonormal rows, of which the element of largest magnitude is positive; float64
    where a factor was, else float32. singular_values: all that were computed, float64, descending. energy: Σσ² of all.
    lost_energy: that of what is left out, over `energy`, 0 … 1. kernel: the algorithm that gave the result; with
    "products" the energy left out is a sample's, good to some per cent.
    """

    pair: LoraPair
    singular_values: Tensor
    energy: float
    lost_energy: float
    kernel: str


def truncate(
    pair: LoraPair, *, rank: int | None = None, energy: float | None = None, kernel: str | None = None
) -> Truncation:
    """The best approximation of B A of at most `rank`, or the least rank that holds the share `energy` of Σσ².

    With neither, or with energy = 1, all that is not zero to rounding. `plan_kernels` chooses the kernel, unless one is
    named. Raises NumericError where a factor holds NaN or infinity, ConfigError for a rank or energy out of range.
    """
    return truncate_stack(Stack(pair.shape, ((pair, 1.0),)), Wanted(rank, energy), kernel)


def truncate_stack(stack: Stack, wanted: Wanted, kernel: str | None = None) -> Truncation:
    """`truncate` for a sum that is kept as its terms."""
    _check(stack, wanted)
    if wanted.energy == 1.0:
        wanted = wanted._replace(energy=None)
    names = plan_kernels(stack.dtype) if kernel is None else (kernel, "qr")
    for name in names:
        if name != "products":  # to which no rank is too much
            stack = _folded(stack)
        spectrum = KERNELS[name](stack, wanted) if stack.rank and all(stack.shape) else _nothing(stack)
        if spectrum is not None:
            return _cut(spectrum, wanted, name)
    raise AssertionError("the QR kernel answers always")


def plan_kernels(dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels to try, the cheapest first; each but the last checks itself.

    float64 factors have more digits than Gram matrices keep. For float32 they are always the cheaper: R² (m + n)
    operations against 4 R² (m + n) of two QR decompositions, and R ≤ min(m, n) here. Products are cheaper still where
    few components of many are wanted.
    """
    return ("qr",) if dtype == torch.float64 else ("products", "gram", "qr")


def truncate_all(
    pairs: Mapping[str, LoraPair], *, rank: int | None = None, energy: float | None = None
) -> dict[str, Truncation]:
    """`truncate` for every module; large ones side by side."""
    costs = [truncation_cost(pair.shape, pair.rank) for pair in pairs.values()]
    cuts = map_modules(lambda pair: truncate(pair, rank=rank, energy=energy), pairs.values(), costs)
    return dict(zip(pairs, cuts, strict=True))


def truncation_cost(shape: tuple[int, int], rank: int) -> float:
    """About how many operations it takes to truncate a sum of so many components: its Gram matrices and its core."""
    stacked = min(rank, *shape)
    return 2.0 * sum(shape) * stacked**2 + EIGEN * stacked**3


def _check(stack: Stack, wanted: Wanted) -> None:
    if wanted.energy is not None and not 0.0 < wanted.energy <= 1.0:
        raise ConfigError(f"energy is {wanted.energy}: expected 0 < energy ≤ 1")
    if wanted.rank is not None and wanted.rank < 0:
        raise ConfigError(f"rank is {wanted.rank}: expected 0 or more")
    for pair, _ in stack.terms:
        for name, factor in (("A", pair.A), ("B", pair.B)):
            # The sum is a quick first look; finite elements may add up to infinity, so a second look decides.
            if not bool(torch.isfinite(factor.sum())) and not bool(torch.isfinite(factor).all()):
                raise NumericError(
                    f"{name} of a pair of shape {pair.shape} holds NaN or infinity: leave that client out"
                )


def _folded(stack: Stack) -> Stack:
    """The stack itself or, where R exceeds min(m, n), its product and an identity: together they are smaller."""
    m, n = stack.shape
    if stack.rank <= min(m, n):
        return stack
    pair = stack.pair()
    product, one = pair.B @ pair.A, torch.eye(min(m, n), dtype=pair.A.dtype, device=pair.A.device)
    return Stack(stack.shape, ((LoraPair(product, one) if m <= n else LoraPair(one, product), 1.0),))


def _nothing(stack: Stack) -> Spectrum:
    pair = stack.pair()
    empty = LoraPair(pair.A[:0], pair.B[:, :0])
    return Spectrum(pair.A.new_zeros(0, dtype=torch.float64), 0.0, 0.0, lambda keep: empty)


def _cut(spectrum: Spectrum, wanted: Wanted, kernel: str) -> Truncation:
    energies = spectrum.energies
    tail = energies.flip(0).cumsum(0).flip(0) + spectrum.beyond
    total = float(tail[0]) if tail.numel() else 0.0
    keep = int((energies > spectrum.floor).sum())
    if wanted.energy is not None:
        keep = min(keep, int((tail > (1.0 - wanted.energy) * total).sum()))
    if wanted.rank is not None:
        keep = min(keep, wanted.rank)
    left = float(tail[keep]) if keep < tail.numel() else spectrum.beyond
    pair = _signed(spectrum.expand(keep))
    return Truncation(pair, energies.sqrt(), total, left / total if total else 0.0, kernel)


def _signed(pair: LoraPair) -> LoraPair:
    """The element of largest magnitude of every row of A made positive."""
    if not pair.rank:
        return pair
    pivot = pair.A.gather(1, pair.A.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(pivot < 0, -1.0, 1.0).to(pair.A.dtype)
    return LoraPair(pair.A.mul_(sign), pair.B.mul_(sign.T))
