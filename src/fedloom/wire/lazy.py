"""Messages of dense floats, decoded tensor by tensor: what is summed up at once need not be in memory as a whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from threading import Lock

from fedloom.compress.entries import Dense, Entry
from fedloom.errors import WireError
from fedloom.wire.codec import OpenedPayload, decode_opened, open_payload
from fedloom.wire.index import DENSE, Item
from fedloom.wire.limits import DEFAULT, Limits
from fedloom.wire.message import Message
from fedloom.wire.streams import Sources


class LazyEntries(Mapping[str, Dense]):
    """Dense entries of plain words, by name. Each is decoded when it is asked for, from the payload, which is kept.

    Whoever asks in order of name has every byte unpacked once. A stream that is not what it should be is a WireError
    at that moment. May be asked from several threads.
    """

    def __init__(self, items: Sequence[Item], starts: Sequence[int], sources: Sources) -> None:
        self._items = {item.name: (item, start) for item, start in zip(items, starts, strict=True)}
        self._sources = sources
        self._lock = Lock()

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __getitem__(self, name: str) -> Dense:
        item, start = self._items[name]
        coding = item.coding
        with self._lock:
            for role in range(coding.role, coding.role + coding.planes):
                self._sources[role].seek(start)
            [values] = coding.get(coding, [item.count], [0], self._sources)
        return Dense(item.shape, values)

    def subset(self, names: Collection[str]) -> LazyEntries:
        """Those of these names."""
        held = [self._items[name] for name in self._items if name in names]
        return LazyEntries([item for item, _ in held], [start for _, start in held], self._sources)


def decode_lazily(payload: bytes, limits: Limits = DEFAULT) -> Message:
    """`decode`, but with `LazyEntries` where all tensors are dense floats; then faults of the streams come to light as
    the entries are read. All other faults are raised here.
    """
    opened = open_payload(payload, limits)
    if any(item.form != DENSE or item.coding.bits for item in opened.items):
        return decode_opened(opened)
    return Message(opened.header, _lazy(opened))


def _lazy(opened: OpenedPayload) -> Mapping[str, Entry]:
    starts: dict[str, int] = {}
    wanted: dict[int, int] = {}
    for coding in {item.coding.number: item.coding for item in opened.items}.values():
        own = [item for item in opened.items if item.coding is coding]
        *begins, total = accumulate((item.count for item in own), initial=0)
        starts |= zip((item.name for item in own), begins, strict=True)
        wanted |= dict.fromkeys(range(coding.role, coding.role + coding.planes), total)
    sizes = {stream.role: stream.size for stream in opened.streams}
    for role in sizes.keys() | wanted.keys():
        if sizes.get(role, 0) != wanted.get(role, 0):
            raise WireError(f"stream {role} has {sizes.get(role, 0):,} bytes where {wanted.get(role, 0):,} are needed")
    return LazyEntries(
        opened.items, [starts[item.name] for item in opened.items], Sources(opened.streams, opened.coded)
    )
