"""Singular components of W = B A from the factors: two algorithms with one face.

Each takes a Stack and what is wanted of it and gives a Spectrum, or None where its own check says that another one is
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fedloom.lora.lowrank.gram import EPS, QUICK_ERROR, Core, core, gram_of
from fedloom.lora.lowrank.leading import core_holding_energy, leading_core, subspace_pays
from fedloom.lora.lowrank.spectrum import Spectrum, Wanted, noise_floor
from fedloom.lora.lowrank.stack import Stack
from fedloom.lora.pair import LoraPair

MAX_GROWTH = 16.0
"""Rows of V are formed in float32 where the squared rounding error grows by this factor at most: two bits lost."""


Find = Callable[..., Core | None]


def spectrum_by_gram(stack: Stack, wanted: Wanted) -> Spectrum | None:
    """Two R × R Gram matrices and the components that are wanted of their core, or all of them.

    For float32 factors and R < min(m, n). Where few components are wanted, or a share of the energy, Gram matrices of
    float32 products are tried first; else, and where they leave a doubt, float64. Beyond the stack it holds the Gram
    matrices and one chunk at a time.
    """
    # The singular values of B A are those of an R × R core made from BᵀB and A Aᵀ, so m and n appear in products only.
    # Squaring loses half the digits: float32 products are kept only where `find` can show that this does no harm.
    rank = wanted.expected if wanted.rank is None and wanted.energy is not None else wanted.rank
    found, dtype = None, None
    for dtype, error, find in _stages(stack.rank, rank, wanted):
        gram_b, gram_a, weights = _grams(stack, dtype)
        found = find(gram_b, gram_a, error=error)
        # An energy cut guesses its rank beforehand: the components found may hold less than is wanted.
        if found is not None and _enough(found, wanted):
            break
        found = None
    if found is None:
        if dtype is not torch.float64:  # the last stage's float64 matrices are as good for all components
            gram_b, gram_a, weights = _grams(stack, torch.float64)
        found = core(gram_b, gram_a)
    if found is None:
        return None
    low = noise_floor(float(found.energies[0]), found.noise, torch.float32)
    expand = partial(_expand_gram, stack, gram_a, weights, found)
    return Spectrum(found.energies, found.beyond, low, expand)


def _stages(stacked: int, rank: int | None, wanted: Wanted) -> Sequence[tuple[torch.dtype, float, Find]]:
    """How to look for the leading components alone: the type of the products, their error, and the algorithm."""
    if rank and subspace_pays(stacked, rank):
        find = partial(leading_core, rank=rank)
        # float32 first: it is faster, and `find` sees whether its error could matter.
        return (torch.float32, QUICK_ERROR, find), (torch.float64, 4 * EPS, find)
    if wanted.rank is None and wanted.energy is not None:
        return ((torch.float32, QUICK_ERROR, partial(core_holding_energy, energy=wanted.energy)),)
    return ()


def _grams(stack: Stack, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """BᵀB, A Aᵀ and the weights, all float64, with products of `dtype`; the weights are in the first."""
    zeros = stack.terms[0][0].A.new_zeros(stack.rank, stack.rank, dtype=torch.float64)
    gram_a = gram_of(stack.chunks("A", dtype), zeros.clone())
    gram_b = gram_of(stack.chunks("B", dtype), zeros)
    weights = stack.weights(gram_b)
    return gram_b.mul_(weights).mul_(weights[:, None]), gram_a, weights


def _enough(found: Core, wanted: Wanted) -> bool:
    """Whether the leading components hold the share of the energy that is wanted."""
    held = float(found.energies.sum())
    return wanted.energy is None or wanted.rank is not None or held >= wanted.energy * (held + found.beyond)


def _expand_gram(stack: Stack, gram_a: Tensor, weights: Tensor, found: Core, keep: int) -> LoraPair:
    """V and W V = B (A V), the latter in float32, V in float64 where its terms cancel.

    A row of V is of length 1 and a sum of multiples of rows of A, each of them rounded: the sum of their squared
    lengths is what the square of the rounding error grows by.
    """
    right = found.right(keep) / found.energies[:keep].sqrt()
    image = (weights[:, None] * (gram_a @ right)).float()
    growth = (right.square() * gram_a.diagonal()[:, None]).sum(0)
    dtype = torch.float32 if bool((growth <= MAX_GROWTH).all()) else torch.float64
    right = right.to(dtype)
    m, n = stack.shape
    vt = torch.empty(keep, n, dtype=torch.float32, device=right.device)
    wv = torch.empty(m, keep, dtype=torch.float32, device=right.device)
    begin = 0
    for chunk in stack.chunks("A", dtype):
        vt[:, begin : begin + chunk.shape[0]] = right.T @ chunk.T
        begin += chunk.shape[0]
    begin = 0
    for chunk in stack.chunks("B", torch.float32):
        torch.mm(chunk, image, out=wv[begin : begin + chunk.shape[0]])
        begin += chunk.shape[0]
    return LoraPair(vt, wv)


def spectrum_by_qr(stack: Stack, wanted: Wanted) -> Spectrum:
    """QR of both factors and an SVD of the core, all in float64: for float64 factors, and where Gram gives up."""
    dtype, pair = stack.dtype, stack.pair()
    a, b = pair.A, pair.B
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    noise = (
        float(torch.linalg.matrix_norm(rb) * torch.linalg.matrix_norm(ra)) * 16 * EPS
    )  # some units for each of three factorisations

    def expand(keep: int) -> LoraPair:
        return LoraPair((vt[:keep] @ qa.T).to(dtype), (qb @ (u[:, :keep] * s[:keep])).to(dtype))

    return Spectrum(s * s, 0.0, noise_floor(float(s[0]) ** 2, noise**2, dtype), expand)
