"""Payloads that wait on disk, each looked at when it is asked for: in memory ten sites' would take ten adapters."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import TypeVar

from fedloom.filed import lay_down, let_go

Key = TypeVar("Key")


class Spool(MutableMapping[Key, bytes]):
    """A mapping whose large values lie in files of `folder` that have no name, so that nothing is left of them.

    On a disk without room a value stays in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[Key, bytes] = {}

    def __setitem__(self, key: Key, payload: bytes) -> None:
        self._held[key] = lay_down(payload, self.folder)

    def __getitem__(self, key: Key) -> bytes:
        held = self._held[key]
        let_go(held)  # of what was looked at the last time
        return held

    def __delitem__(self, key: Key) -> None:
        del self._held[key]

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def clear(self) -> None:
        """Forget all of them."""
        self._held.clear()

    def __iter__(self) -> Iterator[Key]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)
