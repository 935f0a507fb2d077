"""Many tensors in few bits a value, within a budget of bytes: integer codes, zero where a value is not worth its bits.

What a value is worth depends on its place: an error e at a place of weight w costs (w e)². All tensors share one step
of w e, so that bits go where they are worth most; a tensor's own step follows from its mean weight, and places of small
weight in it have a wider zero. An entropy coder is what the codes are meant for: Zstandard's Huffman stage or, where
most of them are zero, positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.compress.entries import Dense, Entry, Quantized, Sparse

Size = Callable[[Mapping[str, Entry]], int]

_BLOCK = 65536  # values in a block, as many as the wire allows: a tensor has one scale, and every block repeats it
_BYTE = 127  # the largest code: no step is so small that a value would need a larger one
_NIBBLE = 7  # the largest of 4 bits; a few values above it are cut off, many make the tensor one of 8 bits
_CUT = 1e-3  # share of a tensor's values that may be cut off
_ZERO = 0.2  # how much wider than rounding's the zero is: what a code costs more than a zero is worth about that
_FAINT = 1e-3  # relative squared weight below which a place is all the same given a step of its own
_LONGEST = 4.0  # `Part.whole`: what is sent of a tensor is not stretched by more
_TRIES = 10
_AIM, _USED = 0.985, 0.97  # of the budget: what a try aims at, and what is good enough
_FEW, _MANY = 0.35, 0.8  # shares of values that are not zero


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """A tensor and the weights of its places, broadcastable to it.

    whole: what is sent has the inner product with the tensor that the tensor has with itself, so that a mean of many is
    not shrunk; else it is as near to the tensor as codes of these values can be.
    """

    values: Tensor
    weights: Tensor
    whole: bool = False

    def weight(self) -> float:
        """Root mean square of the weights; 1 where they say nothing."""
        mean = float(self.weights.square().mean().sqrt())
        return mean if mean > 0.0 and math.isfinite(mean) else 1.0

    def peak(self) -> float:
        """The largest value times the mean weight."""
        return self.weight() * float(self.values.abs().max()) if self.values.numel() else 0.0

    def entry(self, step: float) -> Dense:
        """The tensor in codes. step: of a value times its weight; longer where the largest value needs it."""
        mean = self.weight()
        step = max(step, self.peak() / _BYTE)
        faint = (mean / self.weights).square_().clamp_(max=1 / _FAINT)  # 1/0 is as faint as can be
        sizes = (self.values.abs() * (mean / step) + (0.5 - _ZERO * faint)).floor_().clamp_(0, _BYTE)
        wide = int((sizes > _NIBBLE).sum()) > _CUT * sizes.numel()
        if not wide:
            sizes.clamp_(max=_NIBBLE)
        codes = sizes.copysign_(self.values)
        return Dense(tuple(codes.shape), coded(codes.flatten().to(torch.int8), self._scale(codes), 8 if wide else 4))

    def _scale(self, codes: Tensor) -> float:
        """What a code of 1 stands for."""
        squares = self.weights.square()
        weighted = squares * codes
        product, own = float((weighted * self.values).sum()), float((weighted * codes).sum())
        if not own or product <= 0.0:
            return 0.0
        scale = product / own
        if self.whole:
            scale = min(float((squares * self.values.square()).sum()) / product, _LONGEST * scale)
        return scale


@dataclass(frozen=True, slots=True)
class Coded:
    """Entries, the bytes of their payload, and the step that they were made with."""

    entries: Mapping[str, Entry]
    size: int
    step: float


def code_within(parts: Mapping[str, Part], budget: int, size: Size) -> Coded:
    """The parts with about the smallest step whose payload keeps to a budget of bytes.

    Where none does, all entries are empty: that is the smallest payload that there is.
    """
    elements = max(sum(part.values.numel() for part in parts.values()), 1)
    finest = min((part.peak() for part in parts.values() if part.peak()), default=0.0) / _BYTE
    best: Coded | None = None
    below = above = 0.0  # steps known to be too small, and large enough
    step = max(first_step(parts, 8 * budget / elements), finest)
    for _ in range(_TRIES if finest else 0):  # where all values are zero there is nothing to say
        made = made_with(parts, size, step)
        if made.size <= budget:
            best, above = made, step
            if made.size > _USED * budget or step <= finest:
                break
        else:
            below = step
        # Half the step costs a bit more of every value that is not zero.
        guess = step * 2.0 ** (8 * (made.size - _AIM * budget) / elements)
        if below and above and not below < guess < above:
            guess = math.sqrt(below * above)
        step = max(guess, finest)
    if best is not None:
        return best
    nothing = {name: empty(part) for name, part in parts.items()}
    return Coded(nothing, size(nothing), step)


def first_step(parts: Mapping[str, Part], bits: float) -> float:
    """A step that takes about so many bits a value: rounding errors are even over a step, so they have step² / 12."""
    squares = sum(float((part.values * part.weights).square().sum()) for part in parts.values())
    elements = max(sum(part.values.numel() for part in parts.values()), 1)
    return math.sqrt(12 * squares / elements) * math.pow(2.0, -bits)


def made_with(parts: Mapping[str, Part], size: Size, step: float) -> Coded:
    """The parts in codes of a step: with all their zeros or with the positions of the others, whichever is smaller."""
    dense: dict[str, Dense] = {name: part.entry(step) for name, part in parts.items()}
    sparse = {name: without_zeros(entry) for name, entry in dense.items()}
    kept = sum(entry.positions.numel() for entry in sparse.values())
    share = kept / max(sum(part.values.numel() for part in parts.values()), 1)
    # Encoding takes time; outside these bounds it is clear which is smaller.
    found = [entries for entries, tried in ((sparse, share < _MANY), (dense, share > _FEW)) if tried]
    sizes = [size(entries) for entries in found]
    least = sizes.index(min(sizes))
    return Coded(found[least], sizes[least], step)


def without_zeros(entry: Dense) -> Sparse:
    """The same tensor, its zeros left out."""
    values = entry.values
    assert isinstance(values, Quantized)
    positions = values.codes.nonzero().flatten()
    scale = float(values.scales[0]) if values.scales.numel() else 0.0
    return Sparse(entry.shape, positions, coded(values.codes[positions], scale, values.bits))


def coded(codes: Tensor, scale: float, bits: int) -> Quantized:
    """Codes of one scale, rounded to bfloat16, which every block of them repeats."""
    blocks = -(-codes.numel() // _BLOCK)
    return Quantized(codes, torch.full((blocks,), scale).to(torch.bfloat16).float(), _BLOCK, bits)


def empty(part: Part) -> Sparse:
    """Zeros."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return Sparse(tuple(part.values.shape), nothing, coded(nothing.to(torch.int8), 0.0, 4))
