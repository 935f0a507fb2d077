"""How positions are laid out: the cheapest cells, shared streams, and finite numbers found in one pass."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.entries import all_finite
from fedloom.wire.cells import CellGrid, LineClasses, best_grid, density_classes, divide
from fedloom.wire.positions import _STREAM_BITS, MOST_GAP_STREAMS, _Coded, _shared_streams


def scattered(seed, rows, columns, by_row, by_column):
    """Positions whose density may depend on the row, the column, or both."""
    generator = np.random.default_rng(seed)
    density = np.full((rows, columns), 0.05)
    density *= np.exp(1.5 * generator.standard_normal((rows, 1)) * by_row)
    density *= np.exp(1.5 * generator.standard_normal((1, columns)) * by_column)
    return np.flatnonzero(generator.random((rows, columns)) < np.minimum(density, 1.0))


def slow_bits(grid, positions, width):
    """What a grid costs, each cell counted by itself."""
    rows, columns = np.divmod(positions, width)
    row_of, column_of = (
        np.zeros(lines.count, dtype=np.uint8) if lines.classes is None else lines.classes
        for lines in (grid.rows, grid.columns)
    )
    bits = 0.0
    for i in range(grid.rows.number):
        for j in range(grid.columns.number):
            size = np.count_nonzero(row_of == i) * np.count_nonzero(column_of == j)
            count = np.count_nonzero((row_of[rows] == i) & (column_of[columns] == j))
            for part in (count, size - count):
                bits -= part * math.log2(part / size) if part else 0.0
            bits += 24
    for lines, classes in ((grid.rows, row_of), (grid.columns, column_of)):
        if lines.classes is not None:
            sizes = np.bincount(classes)
            bits += 64 - float(np.sum(sizes * np.log2(sizes / sizes.sum())))
    return bits


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 60), st.integers(2, 60), st.booleans(), st.booleans())
def test_the_grid_is_the_cheapest_of_four(seed, rows, columns, by_row, by_column):
    positions = scattered(seed, rows, columns, by_row, by_column)
    grid, of_rows, of_columns = best_grid(positions, (rows, columns))
    if positions.size >= 32:
        assert np.array_equal(of_rows * columns + of_columns, positions)
        first, second = divide(positions, columns)
        classes = (
            density_classes(np.bincount(first, minlength=rows), columns),
            density_classes(np.bincount(second, minlength=columns), rows),
        )
        whole = LineClasses(rows, None), LineClasses(columns, None)
        grids = [CellGrid(r, c) for r in (whole[0], classes[0]) for c in (whole[1], classes[1])]
        least = min(slow_bits(one, positions, columns) for one in grids)
        assert slow_bits(grid, positions, columns) == pytest.approx(least, rel=1e-9)
    counts, sizes, inner = grid.split(positions, of_rows, of_columns)
    assert counts.sum() == positions.size and sizes.sum() == rows * columns
    grid.join(counts, inner := inner.copy(), grid.rows.number, grid.columns.number)
    assert np.array_equal(inner, positions)


def test_a_few_positions_in_very_many_lines_are_not_sorted_into_classes():
    """Half a billion rows took 4 GiB to count, for a payload of 200 bytes."""
    shape = (2**29, 2)
    positions = np.arange(0, 2000, 50, dtype=np.int64)
    tracemalloc.start()
    try:
        grid, _, _ = best_grid(positions, shape)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert grid.rows.classes is None and grid.columns.classes is None


def slow_streams(cells):
    """The streams of (bin, symbols) with every loss computed anew at every step."""

    def bits(counts):
        present = counts[counts > 0]
        return float(np.sum(present * np.log2(present.sum() / present)))

    found = {}
    for bin_, symbols in cells:
        found[bin_] = found.get(bin_, 0) + np.bincount(symbols, minlength=256)
    groups = [([bin_], found[bin_]) for bin_ in sorted(found)]
    while len(groups) > 1:
        pairs = list(zip(groups, groups[1:], strict=False))
        losses = [bits(left[1] + right[1]) - bits(left[1]) - bits(right[1]) for left, right in pairs]
        at = losses.index(min(losses))
        if losses[at] > _STREAM_BITS and len(groups) <= MOST_GAP_STREAMS:
            break
        groups[at : at + 2] = [(groups[at][0] + groups[at + 1][0], groups[at][1] + groups[at + 1][1])]
    return {bin_: number for number, (bins, _) in enumerate(groups, start=1) for bin_ in bins}


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 90), st.integers(1, 80))
def test_streams_are_shared_as_a_slow_twin_shares_them(seed, cells, bins):
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(cells):
        bin_ = int(generator.integers(bins))
        size = int(generator.integers(1, 2000))
        made.append((bin_, np.minimum(generator.geometric(0.5 ** (1 + bin_ / 12), size), 255).astype(np.uint8)))
    tensors = [_Coded(1, 1, [part.size], [bin_], [part]) for bin_, part in made]
    tensors.append(_Coded(1, 1, [3], [-1], [np.empty(0, dtype=np.uint8)]))
    assert _shared_streams(tensors) == slow_streams(made)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_anywhere(spoilt):
    for size in (1, 7, 1000):
        for where in {0, size // 2, size - 1}:
            values = torch.full((size,), torch.finfo(torch.float32).max)
            values[::2] *= -1
            assert all_finite(values)
            values[where] = spoilt
            assert not all_finite(values)
    assert all_finite(torch.empty(0, 4))
