"""A payload in the making: how large entries would be, and what its receiver will decode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from torch import Tensor

from fedloom.compress.entries import detach_entry
from fedloom.methods.method import Entries
from fedloom.rounds.joint import Outline, join_entries
from fedloom.wire import Header, Message, decode, encode


@dataclass(eq=False, slots=True)
class Draft:
    """Payloads under one header. The last one is kept: what a method measured last is mostly what it sends.

    outline: of the adapter whose tensors may travel together (see `joint`); without one they never do. scratch: see
    `Job`. seconds: spent on encoding so far.
    """

    header: Header
    outline: Outline | None = None
    scratch: Path | None = None
    entries: Entries = field(default_factory=dict)
    encoded: bytes = b""
    joined: bool = False
    seconds: float = 0.0

    def size(self, entries: Entries) -> int:
        """Bytes of the payload that carries these entries. It is kept, unless it is part of the one that is kept."""
        if len(entries) < len(self.entries) and all(entry is self.entries.get(name) for name, entry in entries.items()):
            return len(self._encoded(entries)[0])
        return len(self.payload(entries))

    def payload(self, entries: Entries) -> bytes:
        """The payload that carries these entries."""
        known = self.encoded and entries.keys() == self.entries.keys()
        if not (known and all(entry is self.entries[name] for name, entry in entries.items())):
            self.encoded, self.joined = self._encoded(entries)
            self.entries = dict(entries)
        return self.encoded

    def _encoded(self, entries: Entries) -> tuple[bytes, bool]:
        """The payload that carries these entries, and whether they travel joined."""
        began = perf_counter()
        travelling = join_entries(entries, self.outline)
        payload = encode(Message(self.header, travelling), folder=self.scratch)
        self.seconds += perf_counter() - began
        return payload, travelling is not entries

    def received(self, entries: Entries, apart: Iterable[Tensor]) -> Message:
        """What a receiver decodes from the payload of these entries, bit by bit, in memory that `apart` has no part in.

        Nothing is decoded for it but what travels joined, which is little: encoding loses nothing.
        """
        payload = self.payload(entries)
        if self.joined:
            return decode(payload)
        shared = {tensor.untyped_storage().data_ptr() for tensor in apart}
        return Message(self.header, {name: detach_entry(entries[name], shared) for name in sorted(entries)})
