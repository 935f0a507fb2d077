"""Gaps between positions as one byte each, plus a few extra bits where the gap is large.

A gap is the number of absent elements before a present one. Below 16 it is its own symbol. A larger gap keeps its four
leading bits, as a floating-point number would: its symbol is 8 w + (gap >> w). The other w bits follow in a bit stream,
lowest bit first. Gaps of independent positions have a geometric distribution at any density, which is nearly flat
within one symbol. So the extra bits cannot be packed further, and the symbols pack to their entropy.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import WireError

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

LARGE = 16  # four leading bits: larger gaps have extra bits
LAST_SYMBOL = 8 * 27 + 15
"""The symbol of gaps up to 2³¹ − 1."""

_SYMBOLS = np.arange(256, dtype=np.int64)
SYMBOL_WIDTHS = np.where(_SYMBOLS < LARGE, 0, (_SYMBOLS >> 3) - 1)
_MASKS = (1 << np.arange(32, dtype=np.int64)) - 1
SYMBOL_GAPS = np.where(_SYMBOLS < LARGE, _SYMBOLS, (_SYMBOLS & 7 | 8) << SYMBOL_WIDTHS)


def to_symbols(gaps: Ints) -> tuple[Bytes, Ints, Bytes]:
    """(symbols, extra bits, widths of the extra bits); the last two only for the gaps of 16 and more, in order."""
    symbols = gaps.astype(np.uint8)
    where = np.flatnonzero(gaps >= LARGE)
    large = gaps[where]
    # The exponent of a float64 is biased by 1023; three bits below the leading one stay in the symbol.
    widths = (large.astype(np.float64).view(np.int64) >> 52) - 1026
    leading = large >> widths
    symbols[where] = 8 * widths + leading
    return symbols, large - (leading << widths), widths.astype(np.uint8)


def from_symbols(symbols: Bytes, bits: BitSource) -> Ints:
    """The gaps; takes their extra bits from `bits`. Raises WireError for a symbol that does not exist."""
    gaps = SYMBOL_GAPS[symbols]
    where = np.flatnonzero(symbols >= LARGE)
    if where.size:
        large = symbols[where]
        if large.max() > LAST_SYMBOL:
            raise WireError(f"{large.max()} is not a gap symbol: expected at most {LAST_SYMBOL}")
        gaps[where] += bits.take(SYMBOL_WIDTHS[large])
    return gaps


class BitSink:
    """Packs numbers of given widths one after the other, lowest bit first, into 32-bit words."""

    def __init__(self) -> None:
        self.pieces: list[NDArray[np.uint32]] = []
        self._tail = 0
        self._used = 0

    def add(self, numbers: Ints, widths: Bytes) -> None:
        """Append `numbers`, each below 2^width, with widths of 1 to 31."""
        if not numbers.size:
            return
        ends = np.cumsum(widths, dtype=np.int64) + self._used
        starts = ends - widths
        places = (numbers << (starts & 31)).view(np.uint64)
        words = starts >> 5
        firsts = np.flatnonzero(np.diff(words, prepend=-1))
        total = int(ends[-1])
        packed = np.zeros(total // 32 + 2, dtype=np.uint32)
        # No two numbers share a bit, so sums are unions; and only the last number of a word reaches into the next.
        packed[words[firsts]] = np.add.reduceat(places & np.uint64(0xFFFFFFFF), firsts)
        packed[words[firsts] + 1] += np.add.reduceat(places >> np.uint64(32), firsts).astype(np.uint32)
        packed[0] += np.uint32(self._tail)
        self.pieces.append(packed[: total // 32])
        self._tail, self._used = int(packed[total // 32]), total % 32

    def code(self, inner: Ints, ends: Ints, kernels: ModuleType) -> Bytes:
        """The symbols of positions in cells that end at `ends`, their extra bits appended, in one compiled pass."""
        symbols = np.empty(inner.size, dtype=np.uint8)
        packed = np.empty(inner.size + 1, dtype=np.uint32)  # no gap has a word of extra bits
        full, self._tail, self._used = kernels.code_gaps(inner, ends, self._tail, self._used, symbols, packed)
        self.pieces.append(packed[:full].copy())
        return symbols

    def to_bytes(self) -> Bytes:
        """All bits, the last byte filled up with zeros."""
        tail = np.frombuffer(self._tail.to_bytes(4, "little"), dtype=np.uint8)[: (self._used + 7) // 8]
        return np.concatenate([*(piece.astype("<u4").view(np.uint8) for piece in self.pieces), tail])


class BitSource:
    """Takes back what a BitSink packed."""

    def __init__(self, packed: Bytes) -> None:
        padded = np.concatenate([packed, np.zeros(8, dtype=np.uint8)])
        self._size = 8 * packed.size
        self._at = 0
        # Every offset as the start of a 64-bit word: overlapping, so that one gather finds any number.
        self._words = np.ndarray(packed.size + 1, dtype="<u8", buffer=padded, strides=(1,))

    def take(self, widths: Ints) -> Ints:
        """One number for each width of 1 to 31."""
        ends = np.cumsum(widths) + self._at
        if ends[-1] > self._size:
            raise WireError(f"the extra bits of the gaps end after {self._size:,} bits: {ends[-1]:,} are needed")
        starts = ends - widths
        self._at = int(ends[-1])
        numbers: Ints = self._words[starts >> 3].astype(np.int64)
        numbers >>= starts & 7
        return numbers & _MASKS[widths]

    def follow(self, symbols: Bytes, counts: Ints, sizes: Ints, last: int, out: Ints, kernels: ModuleType) -> bool:
        """The positions in cells of so many symbols and elements, after `last` in the first, in one compiled pass.

        False, and nothing is taken, where a symbol, its bits or a position is not as it should be: whoever goes on
        without kernels finds what it is.
        """
        at = int(kernels.follow_gaps(symbols, self._words, self._at, self._size, counts, sizes, last, out))
        self._at = max(at, self._at)
        return at >= 0

    def end(self) -> None:
        """Raises WireError unless all bits were taken, except zeros that fill up the last byte."""
        left = self._size - self._at
        if left >= 8 or (left and int(self._words[self._at >> 3]) >> (self._at & 7)):
            raise WireError(f"{left:,} of the extra bits belong to no gap")
