"""The forms in which a tensor travels: dense, sparse at positions, or values under a seeded mask.

Values are rounded to fewer bits when the entry is built (`Quantized`), never later. So encoding and decoding lose
nothing, and the sender knows exactly what the receiver will see.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from fedloom.compress.masks import seeded_mask
from fedloom.errors import ShapeError


@dataclass(frozen=True, eq=False, slots=True)
class Quantized:
    """Integers in blocks that share one scale: value = code × scale of its block.

    `codes` is int8, 1-D, one per value (4-bit codes lie in −7 … 7, codes of one bit are −1 and 1); `scales` is float32,
    1-D, one per block of `block` values (the last block may be short); `bits` is 8, 4 or 1.
    """

    codes: Tensor
    scales: Tensor
    block: int
    bits: int

    def numel(self) -> int:
        """Number of values."""
        return self.codes.numel()

    def dequantize(self) -> Tensor:
        """The float32 values, 1-D."""
        found = self.codes.to(torch.float32)
        whole = found.numel() // self.block
        found[: whole * self.block].view(whole, self.block).mul_(self.scales[:whole].unsqueeze(1))
        found[whole * self.block :].mul_(self.scales[whole:])  # the last block may be short: one scale, or none
        return found


Values: TypeAlias = Tensor | Quantized
"""1-D values: a float32, bfloat16 or float16 tensor, or blocks of integers."""


@dataclass(frozen=True, eq=False, slots=True)
class Dense:
    """Every element of a tensor of `shape`, in row-major order."""

    shape: tuple[int, ...]
    values: Values

    def __post_init__(self) -> None:
        _check_count("dense", self.shape, self.values, count(self.shape))


@dataclass(frozen=True, eq=False, slots=True)
class Sparse:
    """Elements at flat row-major `positions` (int64, strictly increasing); all others are zero."""

    shape: tuple[int, ...]
    positions: Tensor
    values: Values

    def __post_init__(self) -> None:
        _check_count("sparse", self.shape, self.values, self.positions.numel())


@dataclass(frozen=True, eq=False, slots=True)
class Seeded:
    """Elements where `masks.seeded_mask(numel, density, seed)` is true; all others are zero.

    `density` is the fraction that the mask keeps, a multiple of 1/65536; the mask itself never travels.
    """

    shape: tuple[int, ...]
    seed: int
    density: float
    values: Values


Entry: TypeAlias = Dense | Sparse | Seeded


def count(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor of `shape`."""
    total = 1
    for size in shape:
        total *= size
    return total


def floats(values: Values) -> Tensor:
    """The values as float32, 1-D."""
    return values.dequantize() if isinstance(values, Quantized) else values.to(torch.float32)


def some_floats(values: Values, which: Tensor) -> Tensor:
    """`floats` of some of the values, by their numbers."""
    if not isinstance(values, Quantized):
        return values.index_select(0, which).to(torch.float32)
    found = values.codes.index_select(0, which).to(torch.float32)
    return found.mul_(values.scales.index_select(0, which // values.block))


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floats holds neither NaN nor infinity, found in one pass."""
    # Minimum and maximum are NaN if any number is: one pass finds both NaN and infinity.
    return not tensor.numel() or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def dense_entry(tensor: Tensor) -> Dense:
    """A float32 dense entry of a whole tensor."""
    return Dense(tuple(tensor.shape), tensor.detach().to(torch.float32).reshape(-1).contiguous())


def plain_entry(entry: Entry) -> Entry:
    """The entry with every tensor on the CPU, contiguous and free of gradients."""
    values = entry.values
    if isinstance(values, Quantized):
        values = replace(values, codes=_plain(values.codes), scales=_plain(values.scales))
    else:
        values = _plain(values)
    if isinstance(entry, Sparse):
        return replace(entry, values=values, positions=_plain(entry.positions))
    return replace(entry, values=values)


def detach_entry(entry: Entry, shared: Collection[int] = ()) -> Entry:
    """`plain_entry` for keeping: nothing else is kept alive by it, or changed with it.

    Dense floats, which `to_dense` does not copy, are copied where they lie in one of the `shared` stretches of memory
    (by address), or in a longer one.
    """
    entry = plain_entry(entry)
    values = entry.values
    if isinstance(entry, Dense) and isinstance(values, Tensor):
        held = values.untyped_storage()
        if held.data_ptr() in shared or held.nbytes() > values.nbytes:
            return replace(entry, values=values.clone())
    return entry


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def to_dense(entry: Entry) -> Tensor:
    """The whole tensor as float32, with zeros where the entry holds nothing."""
    values = floats(entry.values)
    if isinstance(entry, Dense):
        return values.view(entry.shape)
    flat = values.new_zeros(count(entry.shape))
    where = entry.positions if isinstance(entry, Sparse) else seeded_mask(flat.numel(), entry.density, entry.seed)
    flat[where] = values
    return flat.view(entry.shape)


def add_entry(tensor: Tensor, entry: Entry) -> Tensor:
    """`tensor + to_dense(entry)`, bit by bit, in one pass over the tensor where the entry is sparse."""
    if not isinstance(entry, Sparse) or entry.shape != tuple(tensor.shape) or not tensor.is_contiguous():
        return tensor + to_dense(entry)
    total = tensor + 0.0  # a sum with zeros has no -0.0 either
    total.view(-1).index_add_(0, entry.positions, floats(entry.values))
    return total


def entry_bytes(entry: Entry) -> int:
    """What an entry takes in memory."""
    values = entry.values
    size = values.codes.nbytes + values.scales.nbytes if isinstance(values, Quantized) else values.nbytes
    return size + entry.positions.nbytes if isinstance(entry, Sparse) else size


def _check_count(form: str, shape: tuple[int, ...], values: Values, expected: int) -> None:
    if values.numel() != expected:
        raise ShapeError(f"a {form} entry of shape {shape} holds {values.numel()} values, expected {expected}")
