"""What was found out about payloads that are sent to many: found once, however many they go to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Found = TypeVar("Found")

MOST_BYTES = 16 * 2**20
"""Payloads are held on to, so that no other gets their place in memory: no more bytes of them than this."""


class Recall(Generic[Found]):
    """find(payload), remembered by the object that the payload is. The longest unused is forgotten first."""

    def __init__(self, find: Callable[[bytes], Found], most: int = MOST_BYTES) -> None:
        self._find = find
        self._most = most
        self._held: OrderedDict[int, tuple[bytes, Found]] = OrderedDict()
        self._size = 0

    def of(self, payload: bytes) -> Found:
        """What there is to know about the payload."""
        known, found = self._held.get(id(payload), (b"", None))
        if known is payload and found is not None:
            self._held.move_to_end(id(payload))
            return found
        found = self._find(payload)
        if len(payload) <= self._most:
            self._held[id(payload)] = payload, found
            self._size += len(payload)
            while self._size > self._most:
                self._size -= len(self._held.popitem(last=False)[1][0])
        return found
