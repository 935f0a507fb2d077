"""The sparse products of `sparse.py`, compiled by numba.

Each is compiled at its first call and cached beside this file or, where that cannot be written, in the user's cache.

All take flat row-major `positions` (int64, increasing) of the travelling shape, `values` (float32), the `width` of that
shape's rows, and whether its rows are the columns of the tall matrix (`turned`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def increasing(positions: Array, numel: int) -> bool:
    """Whether 0 ≤ positions[0] < positions[1] < … < numel."""
    last = -1
    for position in positions:
        if position <= last or position >= numel:
            return False
        last = position
    return True


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})  # type: ignore[misc, unused-ignore]
def project(positions: Array, values: Array, width: int, turned: bool, factor: Array, out: Array) -> None:
    """out[c, :] += Σ factor[d, :] · value over the elements (d, c) of the tall matrix."""
    rank = factor.shape[1]
    first = 0
    end = width
    for k in range(positions.size):
        while positions[k] >= end:
            first += 1
            end += width
        second = positions[k] - end + width
        row = second if turned else first
        target = out[first] if turned else out[second]
        value = np.float64(values[k])
        for j in range(rank):
            target[j] += value * factor[row, j]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})  # type: ignore[misc, unused-ignore]
def spread(positions: Array, values: Array, width: int, turned: bool, mixing: Array, total: Array) -> None:
    """total[d, :] += value · mixing[c, :] over the elements (d, c) of the tall matrix."""
    rank = mixing.shape[1]
    first = 0
    end = width
    for k in range(positions.size):
        while positions[k] >= end:
            first += 1
            end += width
        second = positions[k] - end + width
        source = mixing[first] if turned else mixing[second]
        target = total[second] if turned else total[first]
        value = values[k]
        for j in range(rank):
            target[j] += value * source[j]


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def place(
    positions: Array, values: Array, width: int, turned: bool, offset: int, ends: Array, columns: Array, sorted_: Array
) -> None:
    """Append every element to its tall row's list, whose end, ends[d], moves on by one."""
    first = 0
    end = width
    for k in range(positions.size):
        while positions[k] >= end:
            first += 1
            end += width
        second = positions[k] - end + width
        row = second if turned else first
        slot = ends[row]
        columns[slot] = offset + (first if turned else second)
        sorted_[slot] = values[k]
        ends[row] = slot + 1


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def tally(positions: Array, width: int, turned: bool, counts: Array) -> None:
    """counts[d] += 1 for every element of tall row d."""
    first = 0
    end = width
    for k in range(positions.size):
        while positions[k] >= end:
            first += 1
            end += width
        counts[positions[k] - end + width if turned else first] += 1


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def outer(ends: Array, columns: Array, values: Array, out: Array) -> None:
    """out[c, c'] += half of value · value' over the pairs of one row, each pair once, so that out + outᵀ is SᵀS."""
    begin = 0
    for d in range(ends.size):
        for p in range(begin, ends[d]):
            value = np.float64(values[p])
            line = out[columns[p]]
            line[columns[p]] += 0.5 * value * value
            for q in range(p + 1, ends[d]):
                line[columns[q]] += value * values[q]
        begin = ends[d]
