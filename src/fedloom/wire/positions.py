"""The positions of all sparse tensors of a message as streams, and back.

A cell that is more than a quarter full is a bitmap. Any other is a list of gap symbols (see `gaps`), in a stream
that it shares with cells of about its density, so that one Huffman code suits them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from fedloom.compress.fast import compiling_pays
from fedloom.errors import WireError
from fedloom.wire.cells import CellGrid, LineClasses, cut, matrix_shape
from fedloom.wire.gaps import BitSink, BitSource, Bytes, Ints, from_symbols, to_symbols
from fedloom.wire.streams import Sink, Sources

CLASSES, BITMAPS, EXTRA, FIRST_GAPS = 0, 1, 2, 32
"""Roles of streams: the gap streams are FIRST_GAPS, FIRST_GAPS + 1, …"""
MOST_GAP_STREAMS = 64  # half octaves of density: 2³¹ elements have 62 of them
_STREAM_BITS = 8 * 90  # about what one more stream costs: its Huffman code, its frame, its line in the index
_STEP = 65536  # positions handled at a time
_NOTHING = np.empty(0, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell in the index: how many positions it has, in which stream (0: the bitmaps, n: gap stream n − 1)."""

    count: int
    stream: int


@dataclass(frozen=True, slots=True)
class Cells:
    """How the positions of one sparse tensor are laid out."""

    row_classes: int
    column_classes: int
    cells: tuple[Cell, ...]

    @property
    def count(self) -> int:
        """Positions in all cells."""
        return sum(cell.count for cell in self.cells)


@dataclass(frozen=True, eq=False, slots=True)
class _Coded:
    """One tensor before streams are assigned: per cell its count, density bin (−1: bitmap) and gap symbols."""

    row_classes: int
    column_classes: int
    counts: list[int]
    bins: list[int]
    symbols: list[Bytes]


class PositionSink:
    """Takes the positions of tensors one by one; `finish` gives every tensor's layout.

    elements: about how many positions there are in all.
    """

    def __init__(self, elements: int = 0) -> None:
        self._kernels = loops(elements)
        self.classes, self.bitmaps, self.extra = Sink(), Sink(), BitSink()
        self.tensors: list[_Coded] = []
        self._waiting: list[tuple[list[Bytes], int, Ints]] = []
        self._held = 0

    def add(self, shape: tuple[int, ...], positions: Ints) -> None:
        """Append one tensor's positions, increasing and within `shape`."""
        grid, counts, sizes, inner = cut(positions, matrix_shape(shape), self._kernels)
        for lines in (grid.rows, grid.columns):
            if lines.classes is not None:
                self.classes.add(lines.classes)
        bins, symbols, end = [], [_NOTHING] * counts.size, 0
        for number, (count, size) in enumerate(zip(counts.tolist(), sizes.tolist(), strict=True)):
            part = inner[end : end + count]
            end += count
            # Above a quarter, gaps take about as many bits as a bitmap, and a bitmap is faster to read.
            bitmap = 4 * count > size
            if bitmap:
                self.bitmaps.add(_bitmap(part, size))
            elif count:
                self._waiting.append((symbols, number, part))
                self._held += count
            bins.append(-1 if bitmap or not count else _density_bin(count, size))
        self.tensors.append(_Coded(grid.rows.number, grid.columns.number, counts.tolist(), bins, symbols))
        if self._held >= _STEP:
            self._code()

    def _code(self) -> None:
        """Make the gap symbols of the cells that wait for them: of many small ones in one go."""
        parts = [part for _, _, part in self._waiting]
        if not parts:
            return
        inner = parts[0] if len(parts) == 1 else np.concatenate(parts)
        ends = np.cumsum([part.size for part in parts])
        symbols = self._symbols(inner, ends)
        begin = 0
        for (of_tensor, number, _), end in zip(self._waiting, ends.tolist(), strict=True):
            of_tensor[number] = symbols[begin:end]
            begin = end
        self._waiting, self._held = [], 0

    def _symbols(self, inner: Ints, ends: Ints) -> Bytes:
        """The gap symbols of positions within cells that end at `ends`; their extra bits are put away."""
        if self._kernels is not None:
            return self.extra.code(inner, ends, self._kernels)
        gaps = inner.copy()
        gaps[1:] -= inner[:-1] + 1
        gaps[ends[:-1]] = inner[ends[:-1]]
        symbols, numbers, widths = to_symbols(gaps)
        self.extra.add(numbers, widths)
        return symbols

    def finish(self) -> tuple[list[Cells], dict[int, Sink]]:
        """The tensors' layouts, in order, and the streams by role."""
        self._code()
        streams = _shared_streams(self.tensors)
        sinks = {CLASSES: self.classes, BITMAPS: self.bitmaps, EXTRA: Sink()}
        sinks |= {FIRST_GAPS + stream - 1: Sink() for stream in set(streams.values())}
        sinks[EXTRA].add(self.extra.to_bytes())
        layouts = []
        for coded in self.tensors:
            cells = []
            for count, bin_, symbols in zip(coded.counts, coded.bins, coded.symbols, strict=True):
                stream = 0 if bin_ < 0 else streams[bin_]
                if stream:
                    sinks[FIRST_GAPS + stream - 1].add(symbols)
                cells.append(Cell(count, stream))
            layouts.append(Cells(coded.row_classes, coded.column_classes, tuple(cells)))
        return layouts, sinks


def _bitmap(positions: Ints, size: int) -> Bytes:
    bits = np.zeros(size, dtype=np.uint8)
    bits[positions] = 1
    return np.packbits(bits, bitorder="little")


def _density_bin(count: int, size: int) -> int:
    """Twice the binary logarithm of size / count, as a whole number: integers alone, so that all machines agree."""
    return (size * size // (count * count)).bit_length()


def _shared_streams(tensors: list[_Coded]) -> dict[int, int]:
    """Density bin → number of its stream, from 1. Neighbouring bins share a stream where that saves bytes."""
    symbols: dict[int, list[Bytes]] = {}
    for coded in tensors:
        for bin_, of_cell in zip(coded.bins, coded.symbols, strict=True):
            if bin_ >= 0:
                symbols.setdefault(bin_, []).append(of_cell)
    # Bins begin apart, each with its own stream. Again and again the two neighbours whose union costs least are joined,
    # while that costs less than the stream it saves. Only neighbours: bins are sorted by density, and cells of like
    # density have like gaps. What a stream takes is estimated by the entropy of its symbols.
    groups = [([bin_], _histogram(np.concatenate(symbols[bin_]))) for bin_ in sorted(symbols)]
    alone = [_bits(counts) for _, counts in groups]
    together = [_bits(left[1] + right[1]) for left, right in zip(groups, groups[1:], strict=False)]
    while len(groups) > 1:
        losses = [both - left - right for both, left, right in zip(together, alone, alone[1:], strict=False)]
        at = min(range(len(losses)), key=losses.__getitem__)
        # Beyond the most streams that the format allows, they are joined at whatever loss.
        if losses[at] > _STREAM_BITS and len(groups) <= MOST_GAP_STREAMS:
            break
        groups[at : at + 2] = [(groups[at][0] + groups[at + 1][0], groups[at][1] + groups[at + 1][1])]
        alone[at : at + 2] = [together[at]]
        # Of the entropies of pairs only those with the new group have changed: one to its left, one to its right.
        first, last = max(at - 1, 0), min(at + 2, len(groups))
        near = groups[first:last]
        together[first : at + 2] = [_bits(left[1] + right[1]) for left, right in zip(near, near[1:], strict=False)]
    return {bin_: number for number, (bins, _) in enumerate(groups, start=1) for bin_ in bins}


def _histogram(symbols: Bytes) -> NDArray[np.int64]:
    """How often each symbol comes, counted in pieces: numpy makes a word of eight bytes of every symbol first."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, symbols.size, _STEP):
        counts += np.bincount(symbols[start : start + _STEP], minlength=256)
    return counts


def _bits(histogram: NDArray[np.int64]) -> float:
    """The entropy of so many symbols, in bits altogether."""
    present = histogram[histogram > 0]
    return float(np.sum(present * np.log2(present.sum() / present)))


class PositionSource:
    """Gives back the positions of tensors one by one. `layouts` are those of all of them."""

    def __init__(self, sources: Sources, layouts: Sequence[Cells]) -> None:
        self._sources = sources
        self._need(layouts)
        total = sum(layout.count for layout in layouts)
        self._kernels = loops(total)
        extra = sources[EXTRA]
        # A gap is below 2³¹, so its extra bits fill less than four bytes.
        if extra.left > 4 * total:
            raise WireError(f"{extra.left:,} bytes of extra bits are more than {total:,} positions can need")
        self._extra = BitSource(extra.take(extra.left))
        # One array for all: many small ones would leave holes between them.
        self._left = np.empty(total, dtype=np.int64)

    def _need(self, layouts: Sequence[Cells]) -> None:
        """Positions are only allocated where streams hold that many."""
        needed: dict[int, int] = {}
        for layout in layouts:
            for cell in layout.cells:
                role = FIRST_GAPS + cell.stream - 1 if cell.stream else BITMAPS
                needed[role] = needed.get(role, 0) + cell.count
        for role, count in needed.items():
            self._sources[role].need((count + 7) // 8 if role == BITMAPS else count)

    def take(self, shape: tuple[int, ...], layout: Cells) -> Ints:
        """One tensor's positions. Raises WireError unless they increase and lie within `shape`."""
        rows, columns = matrix_shape(shape)
        grid = CellGrid(self._lines(rows, layout.row_classes), self._lines(columns, layout.column_classes))
        sizes = grid.sizes(layout.row_classes, layout.column_classes)
        counts = np.array([cell.count for cell in layout.cells], dtype=np.int64)
        if (counts > sizes).any():
            raise WireError(f"a tensor of shape {shape} has a cell with more positions than elements")
        positions, self._left = self._left[: layout.count], self._left[layout.count :]
        end = 0
        for batch in _batches(layout.cells):
            part = positions[end : end + int(counts[batch].sum())]
            end += part.size
            roles = [layout.cells[number].stream for number in range(batch.start, batch.stop)]
            if not roles[0]:
                self._bitmap(part, int(sizes[batch.start]))
            elif len(roles) == 1:
                self._gaps(part, int(sizes[batch.start]), roles[0])
            else:
                self._many(part, counts[batch], sizes[batch], roles)
        grid.join(counts, positions, layout.row_classes, layout.column_classes, self._kernels)
        return positions

    def end(self) -> None:
        """Raises WireError if extra bits are left over."""
        self._extra.end()

    def _lines(self, count: int, classes: int) -> LineClasses:
        if classes == 1:
            return LineClasses(count, None)
        numbers = self._sources[CLASSES].take(count)
        if count and int(numbers.max()) >= classes:
            raise WireError(f"a line is in class {numbers.max()} of {classes}")
        return LineClasses(count, numbers)

    def _gaps(self, out: Ints, size: int, stream: int) -> None:
        """The positions of one cell, of any number."""
        last = -1
        for start in range(0, out.size, _STEP):
            part = out[start : start + _STEP]
            symbols = self._sources[FIRST_GAPS + stream - 1].take(part.size)
            if self._follow(symbols, np.array([part.size]), np.array([size]), last, part):
                last = int(part[-1])
                continue
            gaps = from_symbols(symbols, self._extra)
            gaps += 1
            gaps[0] += last
            np.cumsum(gaps, out=part)
            last = int(part[-1])
            if last >= size:
                raise WireError(f"position {last:,} lies outside a cell of {size:,} elements")

    def _many(self, out: Ints, counts: Ints, sizes: Ints, streams: list[int]) -> None:
        """The positions of several small cells in one go."""
        pieces = [
            self._sources[FIRST_GAPS + stream - 1].take(count)
            for stream, count in zip(streams, counts.tolist(), strict=True)
        ]
        symbols = np.concatenate(pieces)
        if self._follow(symbols, counts, sizes, -1, out):
            return
        gaps = from_symbols(symbols, self._extra)
        gaps += 1
        np.cumsum(gaps, out=out)
        ends = np.cumsum(counts)
        before = np.concatenate([[0], out[ends[:-1] - 1]])
        out -= np.repeat(before + 1, counts)
        if (out[ends - 1] >= sizes).any():
            raise WireError("a position lies outside its cell")

    def _follow(self, symbols: Bytes, counts: Ints, sizes: Ints, last: int, out: Ints) -> bool:
        """Whether compiled loops have found the positions."""
        if self._kernels is None:
            return False
        # A copy where they may not be written: the loops are compiled for one kind of memory.
        given = symbols if symbols.flags.writeable else symbols.copy()
        return self._extra.follow(given, counts, sizes, last, out, self._kernels)

    def _bitmap(self, out: Ints, size: int) -> None:
        found = 0
        for start in range(0, size, _STEP):
            packed = self._sources[BITMAPS].take((min(_STEP, size - start) + 7) // 8)
            part = np.flatnonzero(np.unpackbits(packed, bitorder="little"))
            if part.size > out.size - found or (part.size and start + int(part[-1]) >= size):
                raise WireError(f"a bitmap of {size:,} elements has more than its {out.size:,} positions")
            np.add(part, start, out=out[found : found + part.size])
            found += part.size
        if found != out.size:
            raise WireError(f"a bitmap has {found:,} positions where the index announces {out.size:,}")


def loops(elements: int) -> ModuleType | None:
    """The compiled loops, where they are worth it for so many positions."""
    if not compiling_pays(elements):
        return None
    from fedloom.wire import compiled

    return compiled


def _batches(cells: Sequence[Cell]) -> Iterator[slice]:
    """Cells that hold anything, in order: bitmaps and large cells alone, small ones that follow each other together."""
    start = held = 0
    for number, cell in enumerate(cells):
        if start < number and (not cell.stream or held + cell.count > _STEP):
            yield slice(start, number)
            start, held = number, 0
        held += cell.count
        if not cell.stream:
            if cell.count:
                yield slice(number, number + 1)
            start, held = number + 1, 0
    if start < len(cells):
        yield slice(start, len(cells))
