"""Cells: the parts of a sparse tensor whose positions are coded together, because they are equally dense.

Updates of LoRA factors are not scattered evenly: some rows (components) and some columns (features) change far more
than others. So rows and columns may be sorted into classes of like density; a cell is the submatrix of one row class
and one column class, and its positions are counted row by row within it. A tensor without such structure is one cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from fedloom.wire.gaps import Ints

Bytes = NDArray[np.uint8]

MOST_CLASSES = 8  # octaves of density: so many span a factor of 256
_CELL_BITS = 24  # about what one more cell costs in the index
_CLASS_BITS = 64  # about what the table of one more list of classes costs
_FEW = 32  # positions: fewer cannot pay for a list of classes
_LINES, _LINES_EACH = 2**16, 64  # lines in all and per position: looking at more would take longer than encoding does
_STEP = 65536  # positions handled at a time: their 512 KiB stay in the cache
_EVEN = 1.5  # variance of the counts of lines, over that of evenly scattered positions; up to here it may be chance


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as a matrix: the last dimension are the columns, all others together the rows."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, shape[-1] if shape else 1


@dataclass(frozen=True, eq=False, slots=True)
class LineClasses:
    """The rows, or the columns, of a matrix in classes. `classes` is None where all are in one class.

    held: (lines in each class, number of every line within its class), where they have been counted already.
    """

    count: int
    classes: Bytes | None
    held: tuple[Ints, Ints] | None = None

    @property
    def number(self) -> int:
        """How many classes there are."""
        if self.held:
            return self.held[0].size
        return 1 if self.classes is None else int(self.classes.max()) + 1

    def sizes(self, number: int) -> Ints:
        """Lines in each of `number` classes."""
        if self.held:
            return self.held[0]
        if self.classes is None:
            return np.array([self.count], dtype=np.int64)
        return np.bincount(self.classes, minlength=number).astype(np.int64)

    def ranks(self, lines: Ints, number: int) -> Ints:
        """The numbers of these lines within their classes."""
        if self.classes is None:
            return lines
        sizes = self.sizes(number)
        ranks = np.empty(self.count, dtype=np.int64)
        order = np.argsort(self.classes, kind="stable")
        ranks[order] = np.arange(self.count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return ranks[lines]

    def all(self) -> Bytes:
        """The class of every line."""
        return np.zeros(self.count, dtype=np.uint8) if self.classes is None else self.classes

    def all_ranks(self) -> Ints:
        """The number of every line within its class."""
        return self.held[1] if self.held else self.ranks(np.arange(self.count), self.number)

    def all_ordered(self, number: int) -> tuple[Ints, Ints]:
        """(lines, class after class; where each of `number` classes begins)."""
        sizes = self.sizes(number)
        lines = np.arange(self.count) if self.classes is None else np.argsort(self.classes, kind="stable")
        return lines, sizes.cumsum() - sizes

    def order(self, number: int) -> Callable[[Ints, Bytes], Ints]:
        """The inverse of `ranks`: (numbers within classes, the classes) → lines."""
        if self.classes is None:
            return lambda ranks, classes: ranks
        lines = np.argsort(self.classes, kind="stable")
        sizes = self.sizes(number)
        starts = np.cumsum(sizes) - sizes
        return lambda ranks, classes: lines[ranks + starts[classes]]

    def of(self, lines: Ints) -> Bytes:
        """The class of each of these lines."""
        return np.zeros(lines.size, dtype=np.uint8) if self.classes is None else self.classes[lines]


@dataclass(frozen=True, eq=False, slots=True)
class CellGrid:
    """A matrix cut in cells, numbered row class first; positions within a cell count its rows one after the other."""

    rows: LineClasses
    columns: LineClasses

    def sizes(self, row_classes: int, column_classes: int) -> Ints:
        """Elements of every cell."""
        return np.outer(self.rows.sizes(row_classes), self.columns.sizes(column_classes)).reshape(-1)

    def split(self, positions: Ints, rows: Ints, columns: Ints) -> tuple[Ints, Ints, Ints]:
        """(counts per cell, sizes of the cells, positions within their cells, cell after cell).

        rows, columns: of the positions; not looked at where there is one cell.
        """
        row_classes, column_classes = self.rows.number, self.columns.number
        sizes = self.sizes(row_classes, column_classes)
        if sizes.size == 1:
            return np.array([positions.size], dtype=np.int64), sizes, positions
        cells = self.cells(rows, columns)
        widths = self.columns.sizes(column_classes)
        inner = self.rows.ranks(rows, row_classes) * widths[self.columns.of(columns)]
        inner += self.columns.ranks(columns, column_classes)
        order = np.argsort(cells, kind="stable")
        return np.bincount(cells, minlength=sizes.size), sizes, inner[order]

    def cells(self, rows: Ints, columns: Ints) -> Bytes:
        """The cell of every element."""
        return self.rows.of(rows) * np.uint8(self.columns.number) + self.columns.of(columns)

    def join(
        self, counts: Ints, inner: Ints, row_classes: int, column_classes: int, kernels: ModuleType | None = None
    ) -> None:
        """Turn positions within cells, cell after cell, into increasing positions in the whole, in place."""
        if row_classes * column_classes == 1:
            return
        widths = self.columns.sizes(column_classes)
        if kernels is not None:
            lines = (*self.rows.all_ordered(row_classes), *self.columns.all_ordered(column_classes))
            kernels.join_cells(inner, counts.reshape(row_classes, column_classes), *lines, widths)
            inner.sort(kind="stable")
            return
        row_order, column_order = self.rows.order(row_classes), self.columns.order(column_classes)
        cells = np.repeat(np.arange(counts.size, dtype=np.uint8), counts)
        for start in range(0, inner.size, _STEP):
            part, cell = inner[start : start + _STEP], cells[start : start + _STEP]
            row_class, column_class = np.divmod(cell, np.uint8(column_classes))
            rows, columns = divide(part, widths[column_class])
            np.multiply(row_order(rows, row_class), self.columns.count, out=part)
            part += column_order(columns, column_class)
        inner.sort(kind="stable")  # a merge of the cells' increasing runs, several times faster than any other sort


def divide(positions: Ints, width: int | Ints) -> tuple[Ints, Ints]:
    """(row, column) of positions in a matrix of `width` columns, one width for all or one for each."""
    # Every tensor has fewer than 2³¹ elements, and 32-bit division is several times faster.
    short = positions.astype(np.uint32)
    rows = short // np.asarray(width, dtype=np.uint32)
    return rows.astype(np.int64), positions - rows * np.asarray(width, dtype=np.uint32)


def best_grid(positions: Ints, shape: tuple[int, int]) -> tuple[CellGrid, Ints, Ints]:
    """(grid, rows, columns): the cheapest of one cell, row classes, column classes and both; the positions' lines.

    Where classes cannot pay, the grid is one cell, and the positions themselves stand in for rows and columns.
    """
    flat = CellGrid(LineClasses(shape[0], None), LineClasses(shape[1], None))
    if _is_flat(positions, shape):
        return flat, positions, positions
    rows, columns = divide(positions, shape[1])
    by_row = density_classes(np.bincount(rows, minlength=shape[0]), shape[1])
    by_column = density_classes(np.bincount(columns, minlength=shape[1]), shape[0])
    if by_row.classes is None and by_column.classes is None:
        return flat, rows, columns
    both = CellGrid(by_row, by_column)
    size = by_row.number * by_column.number
    table = np.bincount(both.cells(rows, columns), minlength=size).reshape(by_row.number, by_column.number)
    return _cheapest(both, table)[0], rows, columns


def _cheapest(both: CellGrid, table: Ints) -> tuple[CellGrid, Ints]:
    """The cheapest of four grids, and the positions in each of its cells. table: those of `both`."""
    by_row, by_column = both.rows, both.columns
    whole_rows, whole_columns = LineClasses(by_row.count, None), LineClasses(by_column.count, None)
    heights, widths = by_row.sizes(by_row.number), by_column.sizes(by_column.number)
    height, width = heights.sum(keepdims=True), widths.sum(keepdims=True)
    choices = (
        (both, table, heights, widths),
        (CellGrid(whole_rows, by_column), table.sum(axis=0), height, widths),
        (CellGrid(by_row, whole_columns), table.sum(axis=1), heights, width),
        (CellGrid(whole_rows, whole_columns), table.sum(), height, width),
    )
    bits = _grid_bits([choice[1:] for choice in choices])
    grid, counts, _, _ = choices[bits.index(min(bits))]
    return grid, counts.reshape(-1)


def cut(positions: Ints, shape: tuple[int, int], kernels: ModuleType | None) -> tuple[CellGrid, Ints, Ints, Ints]:
    """(the cheapest grid, what its `split` gives). kernels: `wire.compiled`, where that is worth it."""
    if kernels is None or _is_flat(positions, shape):
        grid, rows, columns = best_grid(positions, shape)
        return grid, *grid.split(positions, rows, columns)
    in_rows, in_columns = np.zeros(shape[0], dtype=np.int64), np.zeros(shape[1], dtype=np.int64)
    kernels.count_lines(positions, in_rows, in_columns)
    both = CellGrid(density_classes(in_rows, shape[1], kernels), density_classes(in_columns, shape[0], kernels))
    table = np.zeros((both.rows.number, both.columns.number), dtype=np.int64)
    if table.size > 1:
        kernels.count_cells(positions, both.rows.all(), both.columns.all(), table)
    grid, counts = _cheapest(both, table) if table.size > 1 else (both, np.array([positions.size]))
    across = grid.columns.number
    sizes = grid.sizes(grid.rows.number, across)
    if sizes.size == 1:
        return grid, counts, sizes, positions
    ends = (counts.cumsum() - counts).reshape(-1, across)
    inner = np.empty_like(positions)
    lines = (grid.rows.all(), grid.rows.all_ranks(), grid.columns.all(), grid.columns.all_ranks())
    kernels.place_in_cells(positions, *lines, grid.columns.sizes(across), ends, inner)
    return grid, counts, sizes, inner


def _is_flat(positions: Ints, shape: tuple[int, int]) -> bool:
    """Whether classes cannot pay, or looking for them would take too long."""
    return positions.size < _FEW or min(shape) < 2 or max(shape) > _LINES + _LINES_EACH * positions.size


def _grid_bits(grids: Sequence[tuple[Ints, Ints, Ints]]) -> list[float]:
    """The estimated bits of positions in each grid: their entropy, and the index entries of cells and classes.

    grids: for each, (positions per cell, rows per row class, columns per column class).
    """
    sizes = [np.outer(heights, widths).reshape(-1) for _, heights, widths in grids]
    size, count = np.concatenate(sizes), np.concatenate([counts.reshape(-1) for counts, _, _ in grids])
    # Kept off 0 and 1, whose logarithms are infinite; the entropy there is 0 to any precision that counts.
    share = np.minimum(np.maximum(count / np.maximum(size, 1), 1e-12), 1.0 - 1e-12)
    information = -size * (share * np.log2(share) + (1.0 - share) * np.log2(1.0 - share))
    starts = list(accumulate((cells.size for cells in sizes[:-1]), initial=0))
    sums = np.add.reduceat(information, starts).tolist()
    lists = {id(lines): lines for _, *sides in grids for lines in sides}  # grids share them
    listed = {key: _class_bits(lines) for key, lines in lists.items()}
    return [
        bits + _CELL_BITS * cells.size + listed[id(heights)] + listed[id(widths)]
        for bits, cells, (_, heights, widths) in zip(sums, sizes, grids, strict=True)
    ]


def density_classes(counts: Ints, length: int, kernels: ModuleType | None = None) -> LineClasses:
    """Lines of `length` elements sorted into classes, each an octave of density wide; the densest class comes first.

    All lines are in one class where their counts vary little more than chance explains.
    """
    total = int(counts.sum())
    spread = counts.size * int((counts * counts).sum()) - total * total
    expected = total * (counts.size * length - total) / length
    if spread <= _EVEN * expected:
        return LineClasses(counts.size, None)
    if kernels is not None:
        classes, ranks = np.empty(counts.size, dtype=np.uint8), np.empty(counts.size, dtype=np.int64)
        sizes = np.zeros(MOST_CLASSES, dtype=np.int64)
        number = kernels.class_lines(counts, length, classes, ranks, sizes)
        held = (sizes[:number], ranks)
        return LineClasses(counts.size, classes, held) if number > 1 else LineClasses(counts.size, None)
    # The binary exponent of length / (count + ½): the half gives an empty line a finite density.
    octaves = np.frexp(2 * length / (2 * counts + 1))[1]
    octaves = np.minimum(octaves - octaves.min(), MOST_CLASSES - 1)
    present = np.flatnonzero(np.bincount(octaves))
    if present.size == 1:
        return LineClasses(counts.size, None)
    renumbered = np.zeros(MOST_CLASSES, dtype=np.uint8)
    renumbered[present] = np.arange(present.size)
    return LineClasses(counts.size, renumbered[octaves])


def _class_bits(sizes: Ints) -> float:
    """Bits that a list of classes of these sizes needs; one class needs no list."""
    if sizes.size == 1:
        return 0.0
    return float(-np.sum(sizes * np.log2(sizes / sizes.sum()))) + _CLASS_BITS
