"""The updates of a round in the form in which they are averaged: each is decoded once, when it is checked.

Updates are checked before any is averaged, since a share of the round rests on who else is in it. Until then they wait
here, as codes and positions, which take little more than their payloads. What is larger is decoded again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fedloom.compress.entries import Entry, Quantized, Sparse
from fedloom.lora.pair import module_of
from fedloom.methods.method import Entries, State
from fedloom.rounds.joint import split_entries
from fedloom.wire import DEFAULT, Limits, Message, decode

SMALL = 2**23
"""Bytes that may always wait: beside a process they are nothing, and updates of small adapters all fit in them."""


@dataclass(eq=False, slots=True)
class Decoded:
    """The entries of updates that wait to be averaged, by client; together less than `room` bytes.

    state: the server's, on which they rest.
    """

    state: State
    room: int
    held: dict[str, Entries] = field(default_factory=dict)
    used: int = 0

    @classmethod
    def beside(cls, state: State) -> Decoded:
        """With the room that there is beside a server's state: less than one more adapter of float32 values.

        So a dense update of float32 values never waits: it is quick to decode, and as large as the adapter itself.
        """
        return cls(state, max(SMALL, 4 * state.adapter.numel()))

    def read(self, payload: bytes, limits: Limits = DEFAULT) -> Message:
        """An update decoded, by whoever checks it; `keep` it where it is good. Raises WireError like `decode`."""
        message = decode(payload, limits)
        return Message(message.header, split_entries(message.entries, self.state))

    def keep(self, client: str, entries: Entries) -> None:
        """Have a client's entries wait, if there is room."""
        self.drop(client)
        size = sum(map(entry_bytes, entries.values()))
        if self.used + size < self.room:
            self.held[client], self.used = entries, self.used + size

    def drop(self, client: str) -> None:
        """Forget a client's entries."""
        self.used -= sum(map(entry_bytes, self.held.pop(client, {}).values()))

    def clear(self) -> None:
        """Forget all of them."""
        self.held.clear()
        self.used = 0

    def entries(self, client: str, payloads: Mapping[str, bytes], modules: Collection[str]) -> dict[str, Entry]:
        """The entries of some modules of a client's update that passed its check; its payload is read if need be."""
        entries = self.held.get(client) or self.read(payloads[client]).entries
        return {name: entry for name, entry in entries.items() if module_of(name) in modules}


def entry_bytes(entry: Entry) -> int:
    """What an entry takes in memory."""
    values = entry.values
    size = values.codes.nbytes + values.scales.nbytes if isinstance(values, Quantized) else values.nbytes
    return size + entry.positions.nbytes if isinstance(entry, Sparse) else size
