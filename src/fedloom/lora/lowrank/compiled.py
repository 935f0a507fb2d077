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

_BLOCK = 2**15
"""Elements of `total` that are worked on at a time: half of a small second cache."""


SOUND, UNORDERED, NOT_FINITE = 0, 1, 2


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def judge_elements(positions: Array, values: Array, numel: int) -> int:
    """SOUND, or UNORDERED unless 0 ≤ positions[0] < … < numel, or NOT_FINITE where a value is NaN or infinite."""
    if not _increasing(positions, numel):
        return UNORDERED
    finite = True
    for k in range(values.size):
        finite &= np.isfinite(values[k])
    return SOUND if finite else NOT_FINITE


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def _increasing(positions: Array, numel: int) -> bool:
    """Whether 0 ≤ positions[0] < positions[1] < … < numel."""
    if not positions.size:
        return True
    ordered = positions[0] >= 0 and positions[-1] < numel
    for k in range(1, positions.size):  # no early exit: so that it runs on vectors
        ordered &= positions[k] > positions[k - 1]
    return bool(ordered)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})  # type: ignore[misc, unused-ignore]
def project_sparse(
    positions: Array, values: Array, width: int, turned: bool, factor: Array, rows: int, part: Array, out: Array
) -> None:
    """out[c, :] += Σ factor[d, :] · value over the elements (d, c) of the tall matrix.

    part: zeros like `out`, of the type to sum the elements of `rows` tall rows in, before they are added to `out`.
    """
    begin = 0
    lines, step = (out.shape[0], 1) if turned else (factor.shape[0], rows)
    for first in range(0, lines, step):
        end = int(np.searchsorted(positions, (first + step) * width))
        if turned:
            _gather(positions, values, begin, end, first * width, factor, part[first])
        else:
            _scatter(positions[begin:end], values[begin:end], factor, part)
            _flush(part, out)
        begin = end
    _flush(part, out)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})  # type: ignore[misc, unused-ignore]
def _scatter(positions: Array, values: Array, rows: Array, part: Array) -> None:
    """part[c, :] += value · rows[d, :] of elements in the order of rows.

    The numbers have no sign, so that numba looks for none that count from the end; a division costs less than a branch
    on where the next row begins.
    """
    columns, width = part.shape
    for k in range(positions.size):
        row = np.uint64(positions[k]) // np.uint64(columns)
        column = np.uint64(positions[k]) - row * np.uint64(columns)
        value = part.dtype.type(values[k])
        for j in range(width):
            part[column, j] += value * rows[row, j]


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def _flush(part: Array, out: Array) -> None:
    for c in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[c, j] += part[c, j]
            part[c, j] = 0.0


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})  # type: ignore[misc, unused-ignore]
def _gather(positions: Array, values: Array, begin: int, end: int, base: int, rows: Array, target: Array) -> None:
    """target += Σ value · rows[position − base, :], two elements at a time."""
    q = begin
    while q + 2 <= end:
        row, next_row = rows[positions[q] - base], rows[positions[q + 1] - base]
        value, next_value = target.dtype.type(values[q]), target.dtype.type(values[q + 1])
        for j in range(target.size):
            target[j] += value * row[j] + next_value * next_row[j]
        q += 2
    if q < end:
        row, value = rows[positions[q] - base], target.dtype.type(values[q])
        for j in range(target.size):
            target[j] += value * row[j]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})  # type: ignore[misc, unused-ignore]
def spread_sparse(positions: Array, values: Array, width: int, turned: bool, mixing: Array, total: Array) -> None:
    """total[d, :] += value · mixing[c, :] over the elements (d, c) of the tall matrix."""
    if turned:
        _spread_turned(positions, values, width, mixing, total)
        return
    columns, across = mixing.shape
    for k in range(positions.size):
        row = np.uint64(positions[k]) // np.uint64(columns)
        column = np.uint64(positions[k]) - row * np.uint64(columns)
        value = values[k]
        for j in range(across):
            total[row, j] += value * mixing[column, j]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})  # type: ignore[misc, unused-ignore]
def _spread_turned(positions: Array, values: Array, width: int, mixing: Array, total: Array) -> None:
    """The same for as many rows of `total` at a time as stay in the cache, over all columns of the tall matrix."""
    columns = mixing.shape[1]
    step = max(_BLOCK // columns, 1)
    begin = np.searchsorted(positions, np.arange(mixing.shape[0]) * width)
    for stop in range(step, width + step, step):
        for column in range(mixing.shape[0]):
            base = column * width
            limit = base + min(stop, width)
            k = begin[column]
            while k < positions.size and positions[k] < limit:
                row, value = np.uint64(positions[k] - base), values[k]
                for j in range(columns):
                    total[row, j] += value * mixing[column, j]
                k += 1
            begin[column] = k


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})  # type: ignore[misc, unused-ignore]
def absorb_sparse(
    kept_positions: Array, kept_values: Array, kept_width: int, kept_turned: bool, rows: int,
    positions: Array, values: Array, width: int, turned: bool,
    basis: Array, left: Array, shrink: Array, weight: float, mixing: Array, total: Array,
) -> None:  # fmt: skip
    """Add S = weight · (shrink + (basisᵀ @ kept change)ᵀ @ left) to mixing, and moving change @ S to total.

    left: of the type to sum in; shrink, mixing: float64. One call a client: between calls, threads wait for each other.
    """
    part = np.zeros_like(left)
    found = np.zeros(left.shape)
    project_sparse(kept_positions, kept_values, kept_width, kept_turned, basis, rows, part, found)
    coefficients = np.empty(left.shape, np.float32)
    for i in range(left.shape[0]):
        line = part[i]  # zeros again
        for c in range(left.shape[0]):
            value = left.dtype.type(found[i, c])
            for j in range(left.shape[1]):
                line[j] += value * left[c, j]
        for j in range(left.shape[1]):
            share = weight * (shrink[i, j] + line[j])
            mixing[i, j] += share
            coefficients[i, j] = share
    spread_sparse(positions, values, width, turned, coefficients, total)


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def place_elements(
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
def tally_rows(positions: Array, width: int, turned: bool, counts: Array) -> None:
    """counts[d] += 1 for every element of tall row d."""
    first = 0
    end = width
    for k in range(positions.size):
        while positions[k] >= end:
            first += 1
            end += width
        counts[positions[k] - end + width if turned else first] += 1


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def add_outer_products(ends: Array, columns: Array, values: Array, out: Array) -> None:
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
