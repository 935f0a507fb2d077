"""The loops over positions, compiled by numba: see `cells` and `gaps`, whose numpy gives the same numbers.

Each is compiled at its first call and cached beside this file or, where that cannot be written, in the user's cache.
Nothing here checks an index: callers have seen that positions lie within their tensor, and that classes exist.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from fedloom.wire.gaps import LAST_SYMBOL, SYMBOL_GAPS, SYMBOL_WIDTHS

Array = np.ndarray[Any, Any]

_BELOW = 2**12
_WIDTHS = np.array([leading.bit_length() for leading in range(_BELOW // 16)], dtype=np.int64)
"""A gap below `_BELOW`, but for its last four bits → its extra bits."""


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def count_lines(positions: Array, rows: Array, columns: Array) -> None:
    """rows[r] += 1 and columns[c] += 1 for every position of a matrix of so many rows and columns."""
    width = columns.size
    row, end, begin = 0, width, 0
    for k in range(positions.size):
        while positions[k] >= end:
            rows[row] += k - begin
            begin = k
            row += 1
            end += width
        columns[positions[k] - end + width] += 1
    if positions.size:
        rows[row] += positions.size - begin


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def class_lines(counts: Array, length: int, classes: Array, ranks: Array, sizes: Array) -> int:
    """The class of every line of so many positions, its number within it, and the lines of each class.

    sizes: zeros, as many as there may be classes. Returns how many there are; see `cells.density_classes`.
    """
    for line in range(counts.size):
        classes[line] = math.frexp(2 * length / (2 * counts[line] + 1))[1]
    first, most = np.int64(classes.min()), np.int64(sizes.size - 1)
    for line in range(counts.size):
        sizes[min(np.int64(classes[line]) - first, most)] += 1
    numbers, number = np.zeros(sizes.size, dtype=np.uint8), 0
    for octave in range(sizes.size):
        if sizes[octave]:
            numbers[octave] = number
            number += 1
    sizes[:] = 0
    for line in range(counts.size):
        own = numbers[min(np.int64(classes[line]) - first, most)]
        classes[line], ranks[line] = own, sizes[own]
        sizes[own] += 1
    return number


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def count_cells(positions: Array, row_classes: Array, column_classes: Array, table: Array) -> None:
    """table[class of the row, class of the column] += 1 for every position."""
    width = column_classes.size
    row, end = 0, width
    for k in range(positions.size):
        while positions[k] >= end:
            row += 1
            end += width
        table[row_classes[row], column_classes[positions[k] - end + width]] += 1


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def place_in_cells(
    positions: Array,
    row_classes: Array,
    row_ranks: Array,
    column_classes: Array,
    column_ranks: Array,
    widths: Array,
    ends: Array,
    inner: Array,
) -> None:
    """Append every position, as it is within its cell, to the cell's list, whose end, ends[row, column class], moves.

    widths: columns of each column class.
    """
    width = column_classes.size
    row, end = 0, width
    for k in range(positions.size):
        while positions[k] >= end:
            row += 1
            end += width
        column = positions[k] - end + width
        above, beside = row_classes[row], column_classes[column]
        slot = ends[above, beside]
        inner[slot] = row_ranks[row] * widths[beside] + column_ranks[column]
        ends[above, beside] = slot + 1


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def join_cells(
    inner: Array,
    counts: Array,
    row_lines: Array,
    row_starts: Array,
    column_lines: Array,
    column_starts: Array,
    widths: Array,
) -> None:
    """The inverse of `place_in_cells`, in place and cell after cell: positions of each cell increase, all do not yet.

    counts[row class, column class]; the lines of class c begin at lines[starts[c]].
    """
    columns = column_lines.size
    n = 0
    for above in range(counts.shape[0]):
        for beside in range(counts.shape[1]):
            width = widths[beside]
            row, end = row_starts[above], width
            for _ in range(counts[above, beside]):
                while inner[n] >= end:
                    row += 1
                    end += width
                column = column_lines[column_starts[beside] + inner[n] - end + width]
                inner[n] = row_lines[row] * columns + column
                n += 1


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def follow_gaps(
    symbols: Array, words: Array, at: int, stop: int, counts: Array, sizes: Array, last: int, out: Array
) -> int:
    """The positions in cells of so many symbols and elements, after `last` in the first; where the extra bits end.

    words: see `BitSource`; of their bits those from `at` to `stop` are left. −1 where anything does not fit.
    """
    n = 0
    for cell in range(counts.size):
        place = last if cell == 0 else -1
        for _ in range(counts[cell]):
            # Looked up for every gap: half of them are large, so that a branch would be taken by chance.
            symbol = symbols[n]
            width = SYMBOL_WIDTHS[symbol]
            if symbol > LAST_SYMBOL or at + width > stop:
                return -1
            extra = np.int64(words[at >> 3] >> np.uint64(at & 7)) & ((1 << width) - 1)
            at += width
            place += SYMBOL_GAPS[symbol] + extra + 1
            if place >= sizes[cell]:
                return -1
            out[n] = place
            n += 1
    return at


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def code_gaps(inner: Array, ends: Array, tail: int, used: int, symbols: Array, packed: Array) -> tuple[int, int, int]:
    """The symbols of positions in cells, and their extra bits in words behind the `used` bits of `tail`.

    Returns how many words are full, and the bits that are left: tail and used again.
    """
    held = np.uint64(tail)
    full = begin = 0
    for end in ends:
        before = np.int64(-1)
        for n in range(begin, end):
            gap = inner[n] - before - 1
            before = inner[n]
            width = _WIDTHS[gap >> 4] if gap < _BELOW else np.int64(8)
            while gap >> width >= 16:
                width += 1
            symbols[n] = 8 * width + (gap >> width)
            held |= np.uint64(gap & ((1 << width) - 1)) << np.uint64(used)
            used += width  # type: ignore[assignment, unused-ignore]
            if used >= 32:
                packed[full] = held & np.uint64(0xFFFFFFFF)
                full += 1
                held >>= np.uint64(32)
                used -= 32
        begin = end
    return full, np.int64(held), used  # type: ignore[return-value, unused-ignore]
