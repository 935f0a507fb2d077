"""Gram matrices in float64, and the singular values and vectors of a product from two of them.

Squaring costs half of the digits: singular values below about 1e-7 of the largest are noise. That is where float32
data ends, too, so for float32 factors nothing is lost; float64 factors take another kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
_CHUNK_VALUES = 2**18
"""Values converted at a time: 2 MiB of float64 stay in the cache between conversion and product."""
_BLOCK = 64
"""Columns of the result at a time, at least: narrower products would not keep BLAS busy."""
_QUICK_ROWS = 1024
"""Rows whose products are summed in float32: few enough for the error that QUICK_ERROR states."""
QUICK_ERROR = 4e-7
"""Frobenius norm of the error of a Gram matrix of float32 products over its own; 5e-8 to 2e-7 were measured."""


def gram(rows: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """X Xᵀ of X (R × d, any float type and strides), converted to `dtype` chunk by chunk."""
    step = max(_CHUNK_VALUES // max(rows.shape[0], 1), 256)
    chunks = (rows[:, begin : begin + step].to(dtype).T for begin in range(0, rows.shape[1], step))
    return gram_of(chunks, rows.new_zeros(rows.shape[0], rows.shape[0], dtype=dtype))


def gram_of(chunks: Iterable[Tensor], out: Tensor) -> Tensor:
    """Σ CᵀC over chunks of rows (d × R), added to `out`, zeros of R × R, of which only one triangle is computed.

    Chunks of float32 added to an `out` of float64 are multiplied in float32 (see QUICK_ERROR) and summed in float64.
    """
    size = out.shape[0]
    block = max(_BLOCK, size // 8)
    for chunk in chunks:
        for i in range(0, size, block):
            left, right = chunk[:, i : i + block].T, chunk[:, i:]
            if chunk.dtype == out.dtype:
                out[i : i + block, i:].addmm_(left, right)
            else:
                out[i : i + block, i:].add_(left @ right)
    return out.triu_() + out.triu(1).T


def quick_gram(tall: Tensor) -> Tensor:
    """FᵀF of F (d × r, float32): products in float32, summed in float64 over blocks of rows; good to about 1e-7."""
    whole = tall.shape[0] // _QUICK_ROWS * _QUICK_ROWS
    blocks, rest = tall[:whole].reshape(-1, _QUICK_ROWS, tall.shape[1]), tall[whole:]
    out = torch.bmm(blocks.mT, blocks).sum(0, dtype=torch.float64)
    return out.add_(rest.T @ rest) if rest.shape[0] else out


@dataclass(frozen=True, eq=False, slots=True)
class Core:
    """The singular value decomposition of W = L Rᵀ in terms of the columns of L and R, or the leading part of it.

    energies: squared singular values, descending, float64. beyond: the sum of those that were not computed. noise: the
    error of an energy; an energy below it counts as zero. root, vectors: float64; their product holds the
    right singular vectors, times their singular values, as combinations of R's columns.
    """

    energies: Tensor
    beyond: float
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
    # (R, R), shifted by about the rounding of its elements, so that a singular matrix still has a Cholesky factor.
    shift = 4 * EPS * torch.linalg.matrix_norm(left)
    noise = float(shift * torch.linalg.matrix_norm(right))
    root, info = torch.linalg.cholesky_ex(left + torch.diag(shift.expand(left.shape[0])))
    if int(info):  # rounding made it indefinite all the same: one wider shift, then give up
        root, info = torch.linalg.cholesky_ex(left + torch.diag((64 * shift).expand(left.shape[0])))
        noise *= 64
        if int(info):
            return None
    energies, vectors = torch.linalg.eigh(root.T @ right @ root)
    energies, vectors = energies.flip(0).clamp_min(0.0), vectors.flip(1)
    # Below this ratio not even the leading component has four digits: QR must decide. Not <=, so that NaN fails too.
    if not float(energies[0]) > 1e4 * noise:
        return None
    return Core(energies, 0.0, noise, root / scale[:, None], vectors)
