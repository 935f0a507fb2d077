"""Gram matrices in float64, and the singular values and vectors of a product from two of them.

Squaring costs half of the digits: singular values below about 1e-7 of the largest are noise. That is where float32
data ends, too, so for float32 factors nothing is lost; float64 factors take another kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
_CHUNK_VALUES = 2**18
_BLOCK = 64
_QUICK_ROWS = 256


def gram(rows: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """X Xᵀ of X (R × d, any float type and strides), converted to `dtype` chunk by chunk, one triangle computed."""
    size, length = rows.shape
    out = rows.new_zeros(size, size, dtype=dtype)
    step = max(_CHUNK_VALUES // max(size, 1), 256)
    block = max(_BLOCK, size // 16)
    for begin in range(0, length, step):
        chunk = rows[:, begin : begin + step].to(dtype)
        for i in range(0, size, block):
            out[i : i + block, i:].addmm_(chunk[i : i + block], chunk[i:].T)
    return out.triu_() + out.triu(1).T


def quick_gram(tall: Tensor) -> Tensor:
    """FᵀF of F (d × r, float32): products in float32, summed in float64 over blocks of rows; good to about 1e-7."""
    whole = tall.shape[0] // _QUICK_ROWS * _QUICK_ROWS
    blocks, rest = tall[:whole].reshape(-1, _QUICK_ROWS, tall.shape[1]), tall[whole:]
    out = torch.bmm(blocks.mT, blocks).sum(0, dtype=torch.float64)
    return out.add_(rest.T @ rest) if rest.shape[0] else out


@dataclass(frozen=True, eq=False, slots=True)
class Core:
    """The singular value decomposition of W = L Rᵀ in terms of the columns of L and R.

    energies: squared singular values, descending, float64. noise: what an energy may be off by; those below are not
    told apart from zero. root, vectors: float64, square.
    """

    energies: Tensor
    noise: float
    root: Tensor
    vectors: Tensor

    def right(self, keep: int) -> Tensor:
        """The first `keep` right singular vectors, times their singular values, as combinations of R's columns."""
        return self.root @ self.vectors[:, :keep]


def core(gram_left: Tensor, gram_right: Tensor) -> Core | None:
    """The core of W = L Rᵀ from LᵀL and RᵀR; None where rounding leaves nothing to trust.

    With LᵀL = C Cᵀ the matrix Cᵀ (RᵀR) C has the energies as eigenvalues E Λ Eᵀ, and V Λ^½ = R C E. Each column of L
    and its partner in R are first brought to the same length, which changes no product. A Gram matrix that is singular
    to rounding is shifted by a few units in the last place of its norm.
    """
    lengths_left, lengths_right = gram_left.diagonal(), gram_right.diagonal()
    live = (lengths_left > 0) & (lengths_right > 0)
    ratio = torch.where(live, lengths_right / lengths_left.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    scale = ratio.pow(0.25)
    left = gram_left * scale * scale[:, None]
    right = gram_right / scale / scale[:, None]
    shift = 4 * EPS * torch.linalg.matrix_norm(left)
    noise = float(shift * torch.linalg.matrix_norm(right))
    root, info = torch.linalg.cholesky_ex(left + torch.diag(shift.expand(left.shape[0])))
    if int(info):
        root, info = torch.linalg.cholesky_ex(left + torch.diag((64 * shift).expand(left.shape[0])))
        noise *= 64
        if int(info):
            return None
    energies, vectors = torch.linalg.eigh(root.T @ right @ root)
    energies, vectors = energies.flip(0).clamp_min(0.0), vectors.flip(1)
    if not float(energies[0]) > 1e4 * noise:
        return None
    return Core(energies, noise, root / scale[:, None], vectors)
