"""Factors that rest: a pair (V, U) that every site computes for itself, so that it never travels.

Either the leading singular vectors of a base weight, or signs drawn from the module's name and shape. Singular vectors
are computed in float64, given one sign, and rounded to bfloat16: libraries of linear algebra differ in their last bits,
and what is left after rounding is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedloom.compress.seeds import derived_seed
from fedloom.lora.pair import LoraPair

_MORE = 8  # columns beside the wanted ones, which make the last of them converge
_PASSES = 4  # through the weight: enough for a subspace, single vectors need not be exact
_SMALL = 4  # times as many columns as are iterated with: below, the whole decomposition costs no more


def leading_pair(weight: Tensor, rank: int, module: str) -> LoraPair:
    """(V, U) of a weight (m, n): A holds r right singular vectors as rows, B the left ones as columns.

    The largest come first. Above rank min(m, n) both go on with zeros.
    """
    whole = weight.detach().to("cpu", torch.float64)
    most = min(rank, *whole.shape)
    width = most + _MORE
    if min(whole.shape) <= _SMALL * width:
        u, _, vh = torch.linalg.svd(whole, full_matrices=False)
    else:
        u, vh = _iterate(whole, width, module)
    u, vh = u[:, :most], vh[:most]
    # A pair of singular vectors is known up to its sign: the largest entry of U is positive.
    signs = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
    b, a = u * signs, vh * signs.T
    missing = rank - most
    pad = torch.nn.functional.pad
    return LoraPair(pad(_rounded(a), (0, 0, 0, missing)), pad(_rounded(b), (0, missing)))


def _iterate(weight: Tensor, width: int, module: str) -> tuple[Tensor, Tensor]:
    """About the leading singular vectors, by subspace iteration (Halko et al., 2011) from signs of the module's own."""
    basis = random_signs(weight.shape[1], width, module, "iterate").double()
    for _ in range(_PASSES):
        left = torch.linalg.qr(weight @ basis).Q
        basis = torch.linalg.qr(weight.T @ left).Q
    left = torch.linalg.qr(weight @ basis).Q
    u, _, vh = torch.linalg.svd(left.T @ weight, full_matrices=False)
    return left @ u, vh


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16).to(torch.float32).contiguous()


def random_pair(shape: tuple[int, int], rank: int, module: str) -> LoraPair:
    """(V, U) of signs: rows of V (r, n) and columns of U (m, r) of length 1, orthogonal but for chance.

    The first components are the same for every rank.
    """
    m, n = shape
    return LoraPair(random_signs(n, rank, module, "V").T.contiguous(), random_signs(m, rank, module, "U"))


def random_signs(length: int, count: int, module: str, what: str) -> Tensor:
    """`count` columns of ±1/√length. No rounding is involved, so that all machines draw the same bits."""
    columns = []
    for number in range(count):
        generator = torch.Generator().manual_seed(derived_seed(0, "resting", what, module, number))
        columns.append(torch.randint(0, 2, (length,), generator=generator).mul_(2).sub_(1).float())
    if not columns:
        return torch.zeros(length, 0)
    return torch.stack(columns, dim=1).div_(length**0.5)
