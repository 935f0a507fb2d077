"""Streams: the bytes of one role in all tensors, one after the other, cut in chunks that are packed one by one.

A chunk holds 128 KiB (the last one less) and is either a Zstandard frame or, where that would not be smaller,
the bytes themselves. Chunks do not depend on one another, so they are packed on as many threads as there are, to the
same bytes, and a reader never holds more than one of a stream.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from fedloom.errors import WireError
from fedloom.filed import let_go

Bytes = NDArray[np.uint8]
T = TypeVar("T")
U = TypeVar("U")

CHUNK = 2**17
"""Unpacked bytes of a chunk: Zstandard's own block size, each with its own Huffman table."""

MOST_EXPANSION = 2**16
"""Unpacked bytes that a packed one can stand for, at most: an RLE block of Zstandard makes 128 KiB of 4."""

_LOOKED_AT = 2**18  # bytes of a stream, read from a file, after which their pages are let go of
_INLINE = 2**22  # bytes: below, starting a thread costs more than it saves

# Literals only: in these streams matches rarely pay, and Huffman coding nearly always does. The smallest
# tables and the longest least match keep Zstandard from looking for matches.
_LITERALS = zstandard.ZstdCompressionParameters(
    window_log=17,
    chain_log=6,
    hash_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
    write_content_size=1,
)
_TEXT = zstandard.ZstdCompressionParameters.from_level(19, window_log=17, write_content_size=1)
_local = threading.local()


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream as the index announces it: its role, unpacked bytes, and bytes of each chunk."""

    role: int
    size: int
    chunks: tuple[int, ...]


def pack(raw: bytes | memoryview, *, text: bool = False) -> bytes | memoryview:
    """A Zstandard frame, or `raw` itself where that is not longer."""
    name = "text" if text else "literals"
    if not hasattr(_local, name):
        setattr(_local, name, zstandard.ZstdCompressor(compression_params=_TEXT if text else _LITERALS))
    coded: bytes = getattr(_local, name).compress(raw)
    return coded if len(coded) < len(raw) else raw


def unpack(coded: memoryview, size: int, what: str) -> memoryview:
    """The `size` bytes that `pack` was given; `size` must have been checked against what is allowed."""
    if len(coded) == size:
        return coded
    if len(coded) > size or size > len(coded) * MOST_EXPANSION:
        raise WireError(f"{what}: {len(coded)} packed bytes cannot stand for {size:,}")
    if not hasattr(_local, "unpacker"):
        _local.unpacker = zstandard.ZstdDecompressor()
    try:
        # The frame's own claim decides what is allocated, so it must be what the index says.
        if zstandard.get_frame_parameters(coded).content_size != size:
            raise WireError(f"{what}: the frame does not announce the {size:,} bytes that the index does")
        raw: bytes = _local.unpacker.decompress(coded, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"{what} is not a valid Zstandard frame: {error}") from error
    if len(raw) != size:
        raise WireError(f"{what}: {len(raw):,} bytes where the index announces {size:,}")
    return memoryview(raw)


class Piece(Protocol):
    """Bytes of a stream that may be made where they are asked for: an array of bytes is one."""

    @property
    def size(self) -> int:
        """How many."""

    def __getitem__(self, part: slice, /) -> Bytes:
        """Some of them."""


class Sink:
    """Collects the pieces of one stream."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.ends: list[int] = []

    @property
    def size(self) -> int:
        """Bytes of all pieces."""
        return self.ends[-1] if self.ends else 0

    @property
    def chunks(self) -> int:
        """How many chunks they make."""
        return -(-self.size // CHUNK)

    def add(self, piece: Piece) -> None:
        """Append bytes. They are looked at when a chunk is asked for: until then they must not change."""
        if piece.size:
            self.pieces.append(piece)
            self.ends.append(self.size + piece.size)

    def chunk(self, number: int) -> memoryview:
        """One of the unpacked chunks, made now: not all of a stream's bytes are in memory at the same time."""
        at, stop = number * CHUNK, min((number + 1) * CHUNK, self.size)
        parts, place = [], bisect_right(self.ends, at)
        while at < stop:
            piece, end = self.pieces[place], self.ends[place]
            begin = end - piece.size
            parts.append(piece[at - begin : min(stop, end) - begin])
            at, place = min(stop, end), place + 1
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).data


class Source:
    """Reads one stream from the front, unpacking a chunk at a time."""

    def __init__(self, stream: Stream, coded: memoryview) -> None:
        self.stream = stream
        self.left = stream.size
        self._whole = self._coded = coded
        self._next = self._looked_at = 0
        self._chunk = np.empty(0, dtype=np.uint8)

    def need(self, size: int) -> None:
        """Raises WireError unless so many bytes are left; to be called before anything is allocated for them."""
        if size > self.left:
            raise WireError(f"stream {self.stream.role} has {self.left:,} bytes left where {size:,} are needed")

    def take(self, size: int) -> Bytes:
        """The next `size` bytes, possibly a view that must not be changed."""
        self.need(size)
        self.left -= size
        pieces = []
        while size > self._chunk.size:
            pieces.append(self._chunk)
            size -= self._chunk.size
            self._chunk = self._unpacked()
        pieces.append(self._chunk[:size])
        self._chunk = self._chunk[size:]
        return pieces[-1] if len(pieces) == 1 else np.concatenate(pieces)

    def seek(self, at: int) -> None:
        """Go on at this byte of the stream. Where it stands there already, no chunk is unpacked again."""
        if at == self.stream.size - self.left:
            return
        self._next = min(at, self.stream.size) // CHUNK
        self._coded = self._whole[sum(self.stream.chunks[: self._next]) :]
        self._chunk = np.empty(0, dtype=np.uint8)
        self.left = self.stream.size - self._next * CHUNK
        self.take(at - self._next * CHUNK)

    def end(self) -> None:
        """Raises WireError unless everything was read."""
        if self.left:
            raise WireError(f"stream {self.stream.role} has {self.left:,} bytes that belong to no tensor")

    def _unpacked(self) -> Bytes:
        number, length = self._next, self.stream.chunks[self._next]
        self._next += 1
        size = min(CHUNK, self.stream.size - number * CHUNK)
        coded, self._coded = self._coded[:length], self._coded[length:]
        self._looked_at += length
        if self._looked_at >= _LOOKED_AT:
            self._looked_at = 0
            let_go(self._whole)
        return np.frombuffer(unpack(coded, size, f"chunk {number} of stream {self.stream.role}"), dtype=np.uint8)


class Sources:
    """The streams of a payload by role; a role that it lacks reads as an empty stream."""

    def __init__(self, streams: Sequence[Stream], coded: memoryview) -> None:
        self._by_role: dict[int, Source] = {}
        for stream in streams:
            size = sum(stream.chunks)
            self._by_role[stream.role] = Source(stream, coded[:size])
            coded = coded[size:]

    def __getitem__(self, role: int) -> Source:
        if role not in self._by_role:
            self._by_role[role] = Source(Stream(role, 0, ()), memoryview(b""))
        return self._by_role[role]

    def end(self) -> None:
        """Raises WireError unless every stream was read to its end."""
        for source in self._by_role.values():
            source.end()


def run_side_by_side(left: Callable[[], T], right: Callable[[], U], size: int) -> tuple[T, U]:
    """Both results. The two run at the same time where `size`, the bytes of work, is worth a thread.

    For few long calls that leave the interpreter alone, as Zstandard's do: many short ones wait for each other.
    """
    if size < _INLINE:
        return left(), right()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(right)
        return left(), other.result()
