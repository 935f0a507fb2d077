"""Parcels in Flower's messages: the payloads as one opaque array of bytes, the facts beside it.

Flower moves a message as a tree of objects, each by a request of its own that is repeated alone where a line breaks. An
array travels as pieces of 5 MiB (flwr 1.41), so a payload of the usual size is a single request: a cut begins it again,
and on a slow line it takes longer than the 30 s that flwr waits for an answer, so that it never arrives. Here the
pieces are smaller. Their size is the sender's affair alone: a receiver puts together whatever pieces it is given.
"""

from __future__ import annotations

from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import InflatableObject

from fedloom.errors import SiteError
from fedloom.filed import in_memory
from fedloom.site.protocol import Parcel, cut_payloads, parse_sizes

ARRAYS, FACTS = "fedloom.payloads", "fedloom.facts"
STYPE = "fedloom.wire.v1"
SIZES = "sizes"
PIECE = 256 * 2**10
"""Bytes of a piece. Two are under way at a time, and both cross a line of 140 kbit/s within flwr's 30 s."""
MOST_PIECES = 64
"""A large payload has larger pieces instead of more: every piece costs both sides a request of some milliseconds."""


class Array(FlowerArray):
    """Flower's array, cut into pieces of ours. It has its name, by which Flower knows the kind of an object."""

    def slice_array(self) -> list[tuple[str, InflatableObject]]:
        """(object id, piece) of all pieces in order; views of the data, made once."""
        if "_chunks" not in self.__dict__:  # under this name flwr forgets them when the data change
            size, view = piece_size(len(self.data)), memoryview(self.data)
            pieces = [ArrayChunk(view[start : start + size]) for start in range(0, len(view), size)]
            self.__dict__["_chunks"] = [(piece.object_id, piece) for piece in pieces]
        chunks: list[tuple[str, InflatableObject]] = self.__dict__["_chunks"]
        return chunks


def piece_size(length: int) -> int:
    """Bytes of each piece of so many bytes; the last one may have fewer."""
    return max(PIECE, -(-length // MOST_PIECES))


def pack_parcel(parcel: Parcel) -> RecordDict:
    """The content of a message. Facts that are None are left out: Flower has no such value."""
    content = b"".join(map(in_memory, parcel.payloads))  # of one payload that is bytes already, those
    facts = {name: value for name, value in parcel.facts.items() if value is not None}
    records = RecordDict({FACTS: ConfigRecord({**facts, SIZES: [len(payload) for payload in parcel.payloads]})})
    if content:
        records[ARRAYS] = held = ArrayRecord()
        held["bytes"] = Array("uint8", (len(content),), STYPE, content)  # ArrayRecord(…) would make it Flower's own
    return records


def unpack_parcel(content: RecordDict) -> Parcel:
    """The parcel in a message's content. Raises SiteError where there is none, or its sizes do not fit."""
    # Not by content.array_records: such a view and its record hold each other, and with them the payloads, until some
    # later collection of garbage.
    facts, held = content.get(FACTS), content.get(ARRAYS)
    if not isinstance(facts, ConfigRecord):
        raise SiteError("the message is none of fedloom's")
    arrays = list(held.values()) if isinstance(held, ArrayRecord) else []
    lengths = parse_sizes(facts.get(SIZES, []))
    if any(array.stype != STYPE for array in arrays) or len(arrays) > 1:
        raise SiteError(f"the message's array is not of type {STYPE}: both sides need the same version of fedloom")
    return Parcel(
        {name: value for name, value in facts.items() if isinstance(value, str | int | float | bool) and name != SIZES},
        cut_payloads(arrays[0].data if arrays else b"", lengths),
    )
