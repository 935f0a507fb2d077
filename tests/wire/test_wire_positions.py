"""How positions are laid out: the cheapest cells, shared streams, and finite numbers found in one pass."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.entries import Sparse, all_finite
from fedloom.compress.fast import MANY, compiling_pays, torch_only
from fedloom.errors import WireError
from fedloom.wire import Header, Message, decode, encode
from fedloom.wire.cells import CellGrid, LineClasses, best_grid, cut, density_classes, divide
from fedloom.wire.positions import (
    _STREAM_BITS,
    EXTRA,
    FIRST_GAPS,
    MOST_GAP_STREAMS,
    Cell,
    Cells,
    PositionSource,
    _Coded,
    _shared_streams,
)
from fedloom.wire.streams import Sources, Stream


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


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 60), st.booleans(), st.booleans())
def test_compiled_loops_lay_positions_out_as_numpy_does(seed, rows, columns, by_row, by_column):
    pytest.importorskip("numba")
    from fedloom.wire import compiled

    positions = scattered(seed, rows, columns, by_row, by_column)
    (slow, *wanted), (grid, *found) = (cut(positions, (rows, columns), kernels) for kernels in (None, compiled))
    assert all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))
    for lines, twin in ((grid.rows, slow.rows), (grid.columns, slow.columns)):
        assert np.array_equal(lines.all(), twin.all()) and lines.number == twin.number
        assert np.array_equal(lines.all_ranks(), twin.all_ranks())
        assert np.array_equal(lines.sizes(lines.number), twin.sizes(twin.number))
    counts, _, inner = found
    grid.join(counts, inner := inner.copy(), grid.rows.number, grid.columns.number, compiled)
    assert np.array_equal(inner, positions)


def test_compiled_loops_write_and_read_the_same_payloads():
    pytest.importorskip("numba")
    import numba  # noqa: F401 - loaded, so that the loops are used at any size

    entries = {}
    for number, (rows, columns) in enumerate([(64, 300), (300, 64), (1, 500), (7, 9), (200, 200)]):
        positions = torch.from_numpy(scattered(number, rows, columns, number % 2, True))
        values = torch.randn(positions.numel(), generator=torch.Generator().manual_seed(number))
        entries[f"m{number}/A"] = Sparse((rows, columns), positions, values)
    message = Message(Header("update", "loom", 1, 0, "0" * 32, "1" * 32, 1), entries)
    with torch_only():
        assert not compiling_pays(MANY)
        payload, plain = encode(message), decode(encode(message))
    assert compiling_pays(1) and encode(message) == payload
    for name, entry in decode(payload).entries.items():
        assert torch.equal(entry.positions, plain.entries[name].positions)
        assert torch.equal(entry.positions, entries[name].positions)


@pytest.mark.parametrize(
    ("symbols", "size", "said"),
    [([3, 255, 1], 10**9, "is not a gap symbol"), ([3, 200], 2**31, "extra bits"), ([3, 4, 1], 9, "outside a cell")],
)
def test_what_compiled_loops_cannot_follow_is_named_as_without_them(symbols, size, said):
    pytest.importorskip("numba")
    import numba  # noqa: F401

    streams = {FIRST_GAPS: np.array(symbols, dtype=np.uint8), EXTRA: np.array([255], dtype=np.uint8)}
    layout = Cells(1, 1, (Cell(len(symbols), 1),))

    def read():
        coded = b"".join(streams[role].tobytes() for role in sorted(streams))
        held = [Stream(role, streams[role].size, (streams[role].size,)) for role in sorted(streams)]
        PositionSource(Sources(held, memoryview(coded)), [layout]).take((1, size), layout)

    with torch_only(), pytest.raises(WireError, match=said) as slow:
        read()
    with pytest.raises(WireError, match=said) as quick:
        read()
    assert str(quick.value) == str(slow.value)


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
