"""Elements of a tensor that are marked: one bit each, by which others at the same places are found with no search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.compress.fast import compiling_pays

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)  # bits that are set in a byte
_LOWER = np.array([2**bit - 1 for bit in range(8)], dtype=np.uint8)  # of the bits below this one


@dataclass(frozen=True, eq=False, slots=True)
class Marks:
    """Some elements of a tensor.

    bits: one for every element, the first in the lowest: whether it is marked. before: for every byte of them, how many
    are set in all bytes before it.
    """

    bits: Bytes
    before: NDArray[np.int32]

    @classmethod
    def of(cls, positions: Ints, numel: int) -> Marks:
        """The marks at these flat positions, which increase, of so many elements."""
        if compiling_pays(positions.size):
            from fedloom.compress import compiled

            bits, before = np.zeros(-(-numel // 8), dtype=np.uint8), np.empty(-(-numel // 8), dtype=np.int32)
            compiled.mark(positions, bits, before, _ONES)
            return cls(bits, before)
        here = np.zeros(numel, dtype=np.bool_)
        here[positions] = True
        bits = np.packbits(here, bitorder="little")
        before = np.cumsum(_ONES[bits], dtype=np.int32)
        before -= _ONES[bits]
        return cls(bits, before)

    def find(self, positions: Ints) -> tuple[Ints, Ints]:
        """Of other positions in the tensor: (which are marked, the number of each one's mark, from 0)."""
        if compiling_pays(positions.size):
            from fedloom.compress import compiled

            found, places = np.empty(positions.size + 1, dtype=np.int64), np.empty(positions.size + 1, dtype=np.int64)
            number = compiled.find_marked(positions, self.bits, self.before, _ONES, found, places)
            return found[:number], places[:number]
        place, lower = positions >> 3, _LOWER[positions & 7]
        held = self.bits.take(place)
        hit = np.flatnonzero((held & (lower + np.uint8(1))) != 0)
        places = self.before.take(place.take(hit)) + _ONES.take(held.take(hit) & lower.take(hit))
        return hit, places.astype(np.int64)
