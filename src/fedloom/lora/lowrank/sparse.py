"""Products with the sparse change of a tall factor, straight from the decoded payload.

A tall factor has one row per feature and r columns: B itself (m × r), or Aᵀ where A (r × n) is what travels. Three
products are all that FedSRD needs; numba does them from the flat positions, torch alone sorts the elements and sums
line by line.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fedloom.compress.entries import Dense, Entry, Sparse, all_finite, count, floats, to_dense
from fedloom.compress.fast import is_hidden
from fedloom.compress.fast import torch_only as torch_only  # found here by who measures the algebra without numba
from fedloom.compress.masks import seeded_mask
from fedloom.errors import NumericError, ShapeError

_CHUNK = 4096
"""Rows of a dense change that are converted to float64 at a time, so that they stay in the cache."""
_TERMS = 512
"""Elements of a column that are summed in float32, on the mean; the partial sums are added in float64."""


@dataclass(frozen=True, eq=False, slots=True)
class Tall:
    """A sparse d × r matrix as it travelled: flat positions in row-major order of the travelling shape.

    turned: the travelling shape is (r, d), not (d, r). values: float32.
    """

    positions: Tensor
    values: Tensor
    size: int
    rank: int
    turned: bool

    @property
    def width(self) -> int:
        """Row length of the travelling shape."""
        return self.size if self.turned else self.rank

    @property
    def block(self) -> int:
        """Rows of the tall matrix in which a column has _TERMS elements, on the mean."""
        return max(_TERMS * self.size * self.rank // max(self.positions.numel(), 1), 1)

    def arrays(self) -> tuple[object, object, int, bool]:
        """What the compiled kernels take first."""
        return self.positions.numpy(), self.values.numpy(), self.width, self.turned

    def to_dense(self) -> Tensor:
        """All of it, d × r, float32."""
        flat = self.values.new_zeros(self.size * self.rank)
        flat[self.positions] = self.values
        return flat.view(self.rank, self.size).T if self.turned else flat.view(self.size, self.rank)

    def lines(self, by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The elements line by line: by rows of the tall matrix, or by columns, anew in every block of rows.

        The column or row of each element, where every line begins (and the last one ends), and the values.
        """
        lanes, inner = self.positions // self.width, self.positions % self.width
        rows, columns = (inner, lanes) if self.turned else (lanes, inner)
        blocks = -(-self.size // self.block)
        keys, count = (rows, self.size) if by_row else (rows // self.block * self.rank + columns, blocks * self.rank)
        places, values = columns if by_row else rows, self.values
        if self.turned or not by_row:  # they travelled in another order
            order = _order(keys, count)
            places, values = places[order], values[order]
        starts = torch.zeros(count + 1, dtype=torch.int64, device=keys.device)
        torch.cumsum(torch.bincount(keys, minlength=count), 0, out=starts[1:])
        return places, starts, values


TallChange = Tall | Tensor
"""What a client adds to a tall factor: sparse, or a dense d × r tensor in any layout."""


def tall_change(entry: Entry, turned: bool) -> TallChange:
    """The entry of B (turned = False) or of A (turned = True) as a change of the tall factor.

    Raises ShapeError for positions that do not increase or lie outside, NumericError for NaN and infinity.
    """
    if isinstance(entry, Dense):
        whole = to_dense(entry)
        if not all_finite(whole):
            raise _not_finite(turned)
        return whole.T if turned else whole
    size, rank = entry.shape[::-1] if turned else entry.shape
    values, numel = floats(entry.values), count(entry.shape)
    if isinstance(entry, Sparse):
        positions = entry.positions
    else:
        mask = seeded_mask(numel, entry.density, entry.seed)
        positions = mask.nonzero().squeeze(1).to(values.device)
    _check(positions, values, numel, turned)
    return Tall(positions, values, size, rank, turned)


def _check(positions: Tensor, values: Tensor, numel: int, turned: bool) -> None:
    """Raise unless memory may be indexed by the positions, from 0 to below numel, and the values are finite."""
    kernels = compiled_for(positions)
    if kernels is not None:
        verdict = kernels.judge_elements(positions.numpy(), values.numpy(), numel)
        ordered, finite = verdict != kernels.UNORDERED, verdict != kernels.NOT_FINITE
    else:
        inside = not positions.numel() or (int(positions[0]) >= 0 and int(positions[-1]) < numel)
        ordered = inside and bool((positions[1:] > positions[:-1]).all())
        finite = all_finite(values)
    if not ordered:
        raise ShapeError(f"the positions of a sparse entry must increase and lie in 0 … {numel - 1}")
    if not finite:
        raise _not_finite(turned)


def _not_finite(turned: bool) -> NumericError:
    return NumericError(f"a change of {'A' if turned else 'B'} holds NaN or infinity: leave that client out")


def project(factor: Tensor, change: TallChange, *, quick: bool = False) -> Tensor:
    """factorᵀ @ change, q × r in float64, of a contiguous d × q factor.

    quick: sums of some hundred terms in float32, which leaves a relative error of about 1e-7.
    """
    if not isinstance(change, Tall):
        return _dense_project(factor, change)
    kernels = compiled_for(factor)
    if kernels is None:
        parts = _gathered(change.lines(by_row=False), factor if quick else factor.double())
        return parts.view(-1, change.rank, factor.shape[1]).sum(0, dtype=torch.float64).T
    out = torch.zeros(change.rank, factor.shape[1], dtype=torch.float64)
    part = torch.zeros_like(out, dtype=torch.float32 if quick else torch.float64)
    kernels.project_sparse(*change.arrays(), factor.numpy(), change.block, part.numpy(), out.numpy())
    return out.T


def _dense_project(factor: Tensor, change: Tensor) -> Tensor:
    out = factor.new_zeros(factor.shape[1], change.shape[1], dtype=torch.float64)
    for begin in range(0, factor.shape[0], _CHUNK):
        out.addmm_(factor[begin : begin + _CHUNK].T.double(), change[begin : begin + _CHUNK].double())
    return out


def spread(total: Tensor, change: TallChange, mixing: Tensor) -> None:
    """Add change @ mixing to `total`, in place and in its type; total is contiguous, d × q, mixing is r × q."""
    mixing = mixing.to(total.dtype, memory_format=torch.contiguous_format)
    if not isinstance(change, Tall):
        total.addmm_(change.to(total.dtype), mixing)
        return
    kernels = compiled_for(total)
    if kernels is None:
        total.add_(_gathered(change.lines(by_row=True), mixing))
        return
    kernels.spread_sparse(*change.arrays(), mixing.numpy(), total.numpy())


def absorb(
    basis: Tensor, left: Tensor, shrink: Tensor, weight: float,
    kept: TallChange, moving: TallChange, mixing: Tensor, total: Tensor,
) -> bool:  # fmt: skip
    """Add S = weight · (shrink + (basisᵀ @ kept)ᵀ @ left) to mixing and moving @ S to total if numba can; else False.

    Products with `kept` are summed in the type of `left`. All tensors are contiguous, shrink and mixing float64.
    """
    kernels = compiled_for(total)
    if kernels is None or not isinstance(kept, Tall) or not isinstance(moving, Tall):
        return False
    matrices = (tensor.numpy() for tensor in (basis, left, shrink))
    sums = mixing.numpy(), total.numpy()
    kernels.absorb_sparse(*kept.arrays(), kept.block, *moving.arrays(), *matrices, weight, *sums)
    return True


def _gathered(lines: tuple[Tensor, Tensor, Tensor], table: Tensor) -> Tensor:
    """For every line the sum of value · table[place, :]: each row of the result is written once, from registers."""
    places, starts, values = lines
    found: Tensor = torch.nn.functional.embedding_bag(
        places, table, starts, mode="sum", per_sample_weights=values.to(table.dtype), include_last_offset=True
    )
    return found


def _order(keys: Tensor, bound: int) -> Tensor:
    """The stable order of keys from 0 to below `bound`; numpy sorts those that fit 16 bits by their digits."""
    if keys.device.type != "cpu":
        return keys.argsort(stable=True)
    # numpy sorts 8 and 16 bits by radix, in linear time.
    return torch.from_numpy(keys.numpy().astype(np.min_scalar_type(bound)).argsort(kind="stable"))


def cross_products(changes: Sequence[Tall]) -> Tensor:
    """SᵀS in float64 of S = [S_1 | S_2 | …], row by row: at 5 % density 1/400 of the dense products. Needs numba."""
    kernels = compiled_for(changes[0].values)
    assert kernels is not None, "callers ask compiled_for first"
    counts = torch.zeros(changes[0].size + 1, dtype=torch.int64)
    for change in changes:
        kernels.tally_rows(change.positions.numpy(), change.width, change.turned, counts[1:].numpy())
    ends = counts.cumsum(0)[:-1].contiguous()
    width = sum(change.rank for change in changes)
    elements = sum(change.values.numel() for change in changes)
    columns = torch.empty(elements, dtype=torch.int64)
    values = torch.empty(elements, dtype=torch.float32)
    offset = 0
    for change in changes:
        kernels.place_elements(*change.arrays(), offset, ends.numpy(), columns.numpy(), values.numpy())
        offset += change.rank
    out = torch.zeros(width, width, dtype=torch.float64)
    kernels.add_outer_products(ends.numpy(), columns.numpy(), values.numpy(), out.numpy())
    return out + out.T


def compiled_for(tensor: Tensor) -> ModuleType | None:
    """The compiled kernels, where numba is installed (`pip install fedloom[fast]`) and the tensor lies on the CPU."""
    return _compiled() if tensor.device.type == "cpu" and not is_hidden() else None


@cache
def _compiled() -> ModuleType | None:
    if importlib.util.find_spec("numba") is None:
        return None
    from fedloom.lora.lowrank import compiled

    return compiled
