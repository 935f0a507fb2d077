"""The leading components of Σ w_k B_k A_k from products with it, at a cost linear in the number of clients.

A product with the sum costs 2 R (m + n) operations a column, R the stacked rank; two Gram matrices cost R² (m + n). All
products are in float32; nothing here is R × R.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fedloom.lora.lowrank.gram import gram
from fedloom.lora.lowrank.leading import MAX_EXCESS, OVERSAMPLING, PAIRED_RANK, possible_gain
from fedloom.lora.lowrank.spectrum import Spectrum, Wanted, noise_floor
from fedloom.lora.lowrank.stack import Stack
from fedloom.lora.pair import LoraPair

MAX_STEPS = 3
"""Beyond so many steps Gram matrices cost no more."""
SAMPLE = 32
"""Random directions that tell how much energy is left out."""
UNSURE = 3.0
"""The energy left out is within this factor of what the sample says: for 32 directions but once in 1e5 cases, and for a
tail of many components nearly always within some per cent."""
_ROUNDING = 1e-12
"""Share of the energy that products of float32 lose anyway."""


def spectrum_by_products(stack: Stack, wanted: Wanted) -> Spectrum | None:
    """Subspace iteration with Rayleigh–Ritz (Halko, Martinsson & Tropp 2011, §4.5) on W itself, for float32 factors.

    It begins with the mean of the A_k, which is nearly the answer where clients began with the same adapter. Ritz
    vectors with residuals ρ_i could still gain Σ ρ_i² / (λ_i − λ_{p+1}); it ends where that is below MAX_EXCESS of the
    energy left out, or rounding. That energy is a sample's. None where a look at the whole might change the rank, where
    the components wanted do not stand out, and where they are too many for this to pay.
    """
    rank = wanted.rank or wanted.expected or 0
    width = rank + OVERSAMPLING
    if not rank or stack.rank <= PAIRED_RANK or 3 * width > min(stack.rank, *stack.shape):
        return None
    generator = torch.Generator().manual_seed(stack.rank)
    x = torch.cat([_mean(stack, rank), _random(stack, OVERSAMPLING, generator)], dim=1)
    for _ in range(MAX_STEPS):
        basis = torch.linalg.qr(_times(stack, x)).Q
        energies, rows, basis = _ritz(_times_transposed(stack, basis), basis)
        if not float(energies[-1]) > 0.0:  # NaN too
            return None
        image = _times(stack, rows)  # σ u of every component
        sizes = energies.sqrt()
        residuals = (torch.linalg.vector_norm(image - basis * sizes.float(), dim=0).double() * sizes).square()
        beyond = _sampled_rest(stack, basis, generator)
        keep = _sure_rank(energies, beyond, wanted)
        total = float(energies.sum()) + beyond
        tail = float(energies[keep:].sum()) + beyond / UNSURE if keep else 0.0
        if keep and possible_gain(energies, residuals, keep) <= MAX_EXCESS * tail + _ROUNDING * total:
            floor = noise_floor(float(energies[0]), 0.0, torch.float32)
            first = partial(_first, rows, image)
            return Spectrum(energies[:keep], float(energies[keep:].sum()) + beyond, floor, first)
        if not keep:
            return None
        x = rows
    return None


def _first(rows: Tensor, image: Tensor, keep: int) -> LoraPair:
    return LoraPair(rows[:, :keep].T.contiguous(), image[:, :keep].contiguous())


def _ritz(seen: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(energies, descending; right vectors n × q; left vectors m × q) from Wᵀ Y and Y."""
    energies, mixing = (part.flip(-1) for part in torch.linalg.eigh(gram(seen.T)))
    # In float64: small components are what is left where large ones cancel.
    rows = torch.cat([part.double() @ mixing for part in torch.split(seen, 1024)])
    return energies, rows.div_(energies.clamp_min(0.0).sqrt()).float(), basis @ mixing.float()


def _sampled_rest(stack: Stack, basis: Tensor, generator: torch.Generator) -> float:
    """‖W − Y Yᵀ W‖² of orthonormal Y, as some random directions see it."""
    seen = _times(stack, _random(stack, SAMPLE, generator))
    return float((seen - basis @ (basis.T @ seen)).double().square().sum()) / SAMPLE


def _sure_rank(energies: Tensor, beyond: float, wanted: Wanted) -> int:
    """The rank to keep, at least 1; 0 where it hangs on how much is beyond, or more are wanted than were found."""
    if wanted.rank is not None:
        return wanted.rank if wanted.energy is None else 0
    assert wanted.energy is not None, "there is a rank to expect only for a share of the energy"
    found = set()
    for rest in (beyond / UNSURE, beyond, beyond * UNSURE):
        tails = energies.flip(0).cumsum(0).flip(0) + rest
        found.add(int((tails > (1.0 - wanted.energy) * float(tails[0])).sum()))
    keep = found.pop()
    return keep if not found and keep < energies.numel() else 0


def _mean(stack: Stack, rank: int) -> Tensor:
    """Σ w_k A_kᵀ of the first `rank` rows, n × rank."""
    total = stack.terms[0][0].A.new_zeros(rank, stack.shape[1], dtype=torch.float32)
    for pair, weight in stack.terms:
        total[: pair.rank].add_(pair.A[:rank], alpha=weight)
    return total.T


def _random(stack: Stack, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(stack.shape[1], columns, generator=generator).to(stack.terms[0][0].A.device)


def _times(stack: Stack, x: Tensor) -> Tensor:
    """W x."""
    total = x.new_zeros(stack.shape[0], x.shape[1])
    for pair, weight in stack.terms:
        total.addmm_(pair.B.float(), pair.A.float() @ x, alpha=weight)
    return total


def _times_transposed(stack: Stack, y: Tensor) -> Tensor:
    """Wᵀ y."""
    total = y.new_zeros(stack.shape[1], y.shape[1])
    for pair, weight in stack.terms:
        total.addmm_(pair.A.float().T, pair.B.float().T @ y, alpha=weight)
    return total
