"""The updates of a round in the form in which they are averaged: each is decoded once, when it is checked.

Updates are checked before any is averaged, since a share of the round rests on who else is in it. Until then they wait
here, as codes and positions, which take little more than their payloads. What is too much is decoded again, and so are
dense floats, tensor by tensor: they are quick to decode, and would take as much memory as the adapter itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from threading import Lock

from fedloom.compress.entries import entry_bytes
from fedloom.lora.pair import module_of
from fedloom.methods.method import Entries, State
from fedloom.rounds.joint import split_entries
from fedloom.wire import DEFAULT, LazyEntries, Limits, Message, decode, decode_lazily

SMALL = 2**23
"""Bytes that may always wait: beside a process they are nothing, and updates of small adapters all fit in them."""


@dataclass(eq=False, slots=True)
class Decoded:
    """The entries of updates that wait to be averaged, by client; together less than `room` bytes.

    Several threads may check updates at once: which of them find room is up to chance, and changes no bit of a round.
    """

    room: int
    held: dict[str, Entries] = field(default_factory=dict)
    used: int = 0
    lock: Lock = field(default_factory=Lock)

    @classmethod
    def beside(cls, state: State) -> Decoded:
        """With the room that there is beside a server's state: less than one more adapter of float32 values."""
        return cls(max(SMALL, 4 * state.adapter.numel()))

    def keep(self, client: str, entries: Entries) -> None:
        """Have a client's entries wait, if there is room."""
        self.drop(client)
        if isinstance(entries, LazyEntries):
            return
        size = sum(map(entry_bytes, entries.values()))
        with self.lock:
            if self.used + size < self.room:
                self.held[client], self.used = entries, self.used + size

    def drop(self, client: str) -> None:
        """Forget a client's entries."""
        with self.lock:
            self.used -= sum(map(entry_bytes, self.held.pop(client, {}).values()))

    def clear(self) -> None:
        """Forget all of them."""
        self.held.clear()
        self.used = 0

    def entries(self, client: str, payloads: Mapping[str, bytes], state: State, modules: Collection[str]) -> Entries:
        """The entries of some modules of a client's update that passed its check; its payload is read if need be.

        state: the server's, on which the update rests.
        """
        entries = self.held.get(client) or read_update(payloads[client], state).entries
        names = {name for name in entries if module_of(name) in modules}
        if len(names) == len(entries):
            return entries
        return entries.subset(names) if isinstance(entries, LazyEntries) else {name: entries[name] for name in names}


def read_update(payload: bytes, state: State, limits: Limits = DEFAULT) -> Message:
    """An update decoded. Raises WireError like `decode`; faults of dense floats come to light as they are read."""
    message = (decode if 4 * state.adapter.numel() < SMALL else decode_lazily)(payload, limits)
    return Message(message.header, split_entries(message.entries, state, message.header.base_digest))
