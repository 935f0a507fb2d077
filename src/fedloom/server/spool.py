"""Payloads that wait on disk, each read when it is asked for: in memory those of ten sites would take ten adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

Key = TypeVar("Key")

SMALL = 2**20
"""Bytes below which a payload stays in memory: a file for it would save nothing."""


class Spool(MutableMapping[Key, bytes]):
    """A mapping whose large values lie in files of `folder` that have no name, so that nothing is left of them.

    On a disk without room a value stays in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[Key, bytes | IO[bytes]] = {}

    def __setitem__(self, key: Key, payload: bytes) -> None:
        if key in self:
            del self[key]
        self._held[key] = payload
        if len(payload) >= SMALL:
            with suppress(OSError):
                self._held[key] = _written(self.folder, payload)

    def __getitem__(self, key: Key) -> bytes:
        held = self._held[key]
        if isinstance(held, bytes):
            return held
        held.seek(0)
        return held.read()

    def __delitem__(self, key: Key) -> None:
        held = self._held.pop(key)
        if not isinstance(held, bytes):
            held.close()

    def __contains__(self, key: object) -> bool:
        return key in self._held  # Mapping's own would read the payload

    def clear(self) -> None:
        """Forget all of them, unread."""
        for key in list(self._held):
            del self[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __del__(self) -> None:
        self.clear()


def _written(folder: Path, payload: bytes) -> IO[bytes]:
    # Without a buffer: what is left in one when the file is read makes `read` put the two together, in a second copy.
    file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (it stays open)
    try:
        left = memoryview(payload)
        while left:
            left = left[file.write(left) :]
    except BaseException:
        with suppress(OSError):
            file.close()
        raise
    return file
