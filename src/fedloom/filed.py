"""Payloads that lie in a file without a name, and are read as bytes are.

A payload of full precision is nearly as large as the adapter, and beside two states a process has better uses for the
memory. Such a one is written to a file as it is made or as it comes in. What is seen of it is a read-only view of the
file's pages: the system holds them as it holds those of any file, and they count to the process while it looks at them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO, cast

SMALL = 2**20
"""Bytes below which a payload stays in memory: a file for it would save nothing."""
AT_ONCE = 2**20
"""Bytes of a payload that are looked at before their pages are let go of."""

_WRITTEN = 2**16
"""Bytes of a write. Linux keeps a file in pieces as large as its writes, up to 2 MiB, and counts all of a piece to
whoever looks at a byte of it."""
_DROP: int | None = getattr(mmap, "MADV_DONTNEED", None)
_MAPPED: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
"""The pages of all payloads of this process that lie in files."""


Seal = Callable[[Iterable[bytes | memoryview]], bytes]
"""What follows a payload, such as its checksum, made of all of it, piece by piece."""


class Sheet:
    """Takes a payload from front to back: in a file of `folder`; in memory where none is given, where there are few
    bytes, or where the disk has no room.

    expected: about how many bytes there will be. gap: the most that `closed` may put in front. reserve: whether memory
    for all of them is set aside at once; otherwise it is taken as they come.
    """

    def __init__(self, folder: Path | None, expected: int, *, gap: int = 0, reserve: bool = False) -> None:
        self._gap, self._size = gap, 0
        self._file: IO[bytes] | None = None
        if folder is not None and expected >= SMALL:
            with suppress(OSError):
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (it stays open)
        # A buffer that grows piece by piece is there twice whenever it does. Zeros that nobody has written to take no
        # memory, so that one may be as large as it ever gets from the start.
        self._memory = BytesIO(bytes(expected + gap) if reserve and self._file is None else b"")

    @property
    def is_in_memory(self) -> bool:
        """Whether there was no file to be had, or no room in it."""
        return self._file is None

    def write(self, piece: bytes | memoryview) -> int:
        """Append; returns how many bytes that were."""
        if self._file is not None:
            try:
                _write_at(self._file, piece, self._gap + self._size)
            except OSError:
                self._take_to_memory(self._file)
        if self._file is None:
            self._memory.write(piece)
        self._size += len(piece)
        return len(piece)

    def closed(self, head: bytes | bytearray = b"", seal: Seal | None = None) -> bytes:
        """The payload: `head`, what was written, and what `seal` makes of that. Nothing can be written after it."""
        if self._file is not None:
            if len(head) <= self._gap:
                with suppress(OSError):
                    return self._closed_file(self._file, head, seal)
            self._take_to_memory(self._file)
        self._memory.truncate()
        _put_before(head, self._memory)
        if seal is not None:
            with self._memory.getbuffer() as whole:
                end = seal([whole])
            self._memory.write(end)
        # What is written to BytesIO can be taken out as bytes without a copy.
        return self._memory.getvalue()

    def _closed_file(self, file: IO[bytes], head: bytes | bytearray, seal: Seal | None) -> bytes:
        start, end = self._gap - len(head), self._gap + self._size
        _write_at(file, head, start)
        if seal is not None:
            check = seal(_read_between(file, start, end))
            _write_at(file, check, end)
            end += len(check)
        pages = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ)  # with a descriptor of its own
        file.close()
        _MAPPED.add(pages)
        # Whoever reads a payload asks of it what bytes and a read-only view of bytes both have.
        return cast(bytes, memoryview(pages)[start:])

    def __del__(self) -> None:
        if self._file is not None:  # also where nobody came to close it: a line that broke, an entry that cannot travel
            self._file.close()

    def _take_to_memory(self, file: IO[bytes]) -> None:
        self._file = None
        with file:
            for piece in _read_between(file, self._gap, self._gap + self._size):
                self._memory.write(piece)


def lay_down(payload: bytes, folder: Path | None) -> bytes:
    """The payload in a file of `folder`, if it is large and there is room; one that lies in a file stays there."""
    if folder is None or len(payload) < SMALL or _pages_of(payload) is not None:
        return payload
    sheet = Sheet(folder, len(payload))
    for piece in slices(payload):
        sheet.write(piece)
        if sheet.is_in_memory:
            return payload
    return sheet.closed()


def in_memory(payload: bytes) -> bytes:
    """The payload as bytes of the process's own."""
    if isinstance(payload, bytes):
        return payload
    sheet = Sheet(None, len(payload), reserve=True)
    for piece in slices(payload):
        sheet.write(piece)
    return sheet.closed()


def slices(payload: bytes | memoryview) -> Iterator[memoryview]:
    """The payload piece by piece; of one that lies in a file no more than one piece counts to the process."""
    whole = memoryview(payload)
    step = len(whole) if _pages_of(whole) is None else AT_ONCE
    for start in range(0, len(whole), max(step, 1)):
        yield whole[start : start + step]
        let_go(whole)


def let_go(payload: bytes | memoryview) -> None:
    """Have the memory back of what was looked at of a payload that lies in a file. It can be looked at again."""
    pages = _pages_of(payload)
    if pages is not None and _DROP is not None:
        pages.madvise(_DROP)


def let_go_of_all() -> None:
    """`let_go` of every payload that lies in a file."""
    if _DROP is not None:
        for pages in list(_MAPPED):
            pages.madvise(_DROP)


def _pages_of(payload: bytes | memoryview) -> mmap.mmap | None:
    held = payload.obj if isinstance(payload, memoryview) else payload
    return held if isinstance(held, mmap.mmap) else None


def _write_at(file: IO[bytes], piece: bytes | bytearray | memoryview, at: int) -> None:
    left = memoryview(piece)
    while left:
        done = os.pwrite(file.fileno(), left[:_WRITTEN], at)
        left, at = left[done:], at + done


def _read_between(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    while start < end:
        piece = os.pread(file.fileno(), min(AT_ONCE, end - start), start)
        if not piece:
            raise OSError("a file without a name was cut short")
        yield piece
        start += len(piece)


def _put_before(head: bytes | bytearray, whole: BytesIO) -> None:
    """Write `head` before all that is there; the end is the place to go on at."""
    if not head:
        return
    size = whole.tell()
    whole.write(bytes(len(head)))
    with whole.getbuffer() as buffer:
        buffer[len(head) :] = buffer[:size]
        buffer[: len(head)] = head
