"""Message ↔ bytes, as docs/wire-format.md specifies.

magic "FLOM" | version | header | index (packed) | chunks of the streams | checksum
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from fedloom.compress.entries import Dense, Entry, Quantized, Seeded, Sparse, Values, count, plain_entry
from fedloom.compress.masks import STEPS
from fedloom.errors import WireError
from fedloom.filed import Sheet, slices
from fedloom.wire.checks import check_entry, check_mask
from fedloom.wire.fields import FieldReader, FieldWriter
from fedloom.wire.gaps import Ints
from fedloom.wire.index import (
    DENSE,
    SEEDED,
    SPARSE,
    Demand,
    Item,
    read_header_fields,
    read_index,
    write_header,
    write_index,
)
from fedloom.wire.limits import DEFAULT, Limits
from fedloom.wire.message import Header, Message
from fedloom.wire.positions import Cells, PositionSink, PositionSource
from fedloom.wire.streams import Sink, Sources, Stream, pack, run_side_by_side, unpack
from fedloom.wire.values import CODINGS, coding_of, tensor_of

MAGIC = b"FLOM"
VERSION = 2
CHECKSUM_BYTES = 8
_AT_ONCE = 32  # chunks that are packed before they are written: 4 MiB, worth the two threads
Sinks = dict[int, Sink]


@dataclass(frozen=True, eq=False, slots=True)
class OpenedPayload:
    """A payload whose checksum, header and index were found good; the streams are still packed."""

    header: Header
    items: list[Item]
    streams: list[Stream]
    coded: memoryview
    header_bytes: int
    index_bytes: int


@dataclass(frozen=True, eq=False, slots=True)
class UnpackedMessage:
    """A message as items and streams, before anything is packed; work: about the bytes that packing will read."""

    header: Header
    items: list[Item]
    sinks: Sinks
    work: int

    def payload(
        self, *, pack_streams: bool = True, pack_index: bool = True, folder: Path | None = None
    ) -> tuple[bytes, int]:
        """The payload, and the size of its unpacked index. folder: see `encode`."""
        # No chunk is longer than unpacked. Before the streams come the index, which names every tensor and every
        # chunk, and the header.
        streams_bytes = sum(sink.size for sink in self.sinks.values())
        names = sum(len(item.name.encode()) for item in self.items)
        gap = 2**12 + names + 64 * len(self.items) + streams_bytes // 2**14
        sheet = Sheet(folder, streams_bytes, gap=gap, reserve=True)
        streams = _pack_streams(self.sinks, self.work, pack_streams, sheet)
        index = write_index(self.items, streams)
        out = FieldWriter()
        out.data += MAGIC
        out.byte(VERSION)
        write_header(out, self.header)
        out.varint(len(index))
        out.sized_bytes(bytes(pack(index, text=True) if pack_index else index))
        return sheet.closed(out.data, _checksum), len(index)


def encode(message: Message, limits: Limits = DEFAULT, folder: Path | None = None) -> bytes:
    """The payload of a message: the same bytes for equal messages, whatever the order of entries or number of threads.

    folder: where it lies in a file without a name (`filed`), if it is large; None: in memory.
    A reader with these limits reads it. Raises WireError where header or entries cannot travel, or ask for more than
    `limits`; the error names the entry that is wrong in itself.
    """
    unpacked = _unpacked(message)
    asked = Demand()
    for item in unpacked.items:
        asked.add(item)
    refusal = asked.refusal(limits)
    # A reader takes many tensors, and large masks, only from payloads of some size. What packs so well that it stays
    # below that (tens of thousands of tensors that are empty, or all zero) travels with less of it packed.
    for pack_streams, pack_index in () if refusal else ((True, True), (True, False), (False, False)):
        payload, index_size = unpacked.payload(pack_streams=pack_streams, pack_index=pack_index, folder=folder)
        refusal = asked.refusal(limits.of_payload(len(payload)), index_size)
        if not refusal and len(payload) > limits.max_payload:
            refusal = f"{len(payload):,} bytes of payload: at most {limits.max_payload:,} are allowed"
        if not refusal:
            return payload
    raise WireError(
        f"the message cannot be sent, a reader would refuse it: it has {refusal}. Send fewer modules or lower ranks, "
        "sparse tensors instead of seeded masks, or give sender and reader larger Limits"
    )


def _unpacked(message: Message) -> UnpackedMessage:
    """The message checked and as streams. Raises WireError that names the entry that cannot travel."""
    names = sorted(message.entries, key=lambda name: name.encode(errors="surrogatepass"))
    entries = {name: plain_entry(message.entries[name]) for name in names}
    for name, entry in entries.items():
        check_entry(name, entry)
    work = 8 * sum(entry.values.numel() for entry in entries.values())
    cells, position_sinks = _put_positions(entries)
    value_sinks = _put_values(entries)
    items = [_item(name, entry, cells.get(name)) for name, entry in entries.items()]
    return UnpackedMessage(message.header, items, position_sinks | value_sinks, work)


def decode(payload: bytes, limits: Limits = DEFAULT) -> Message:
    """The message that `encode` was given, bit by bit.

    Raises WireError, and only that, for a payload that is invalid, of another version of the format, or asks for more
    than `limits`. Nothing is allocated for a number in the payload before that number was checked.
    """
    return decode_opened(open_payload(payload, limits))


def decode_opened(opened: OpenedPayload) -> Message:
    """The message of an opened payload. Raises WireError like `decode`."""
    sources = Sources(opened.streams, opened.coded)
    positions = _take_positions(opened.items, sources)
    values = _take_values(opened.items, sources)
    sources.end()
    return Message(opened.header, {item.name: _entry(item, positions, values) for item in opened.items})


def read_header(payload: bytes, limits: Limits = DEFAULT) -> Header:
    """The header of a payload with a good checksum. Raises WireError like `decode`; leaves the tensors alone."""
    return _start(payload, limits)[0]


def open_payload(payload: bytes, limits: Limits = DEFAULT) -> OpenedPayload:
    """The payload as far as it can be read without unpacking a stream. Raises WireError like `decode`."""
    header, fields = _start(payload, limits)
    limits = limits.of_payload(len(payload))
    header_bytes = fields.at
    size = fields.varint("the size of the index", limits.max_index)
    packed = fields.take(fields.varint("the length of the index"), "the index")
    index_bytes = fields.at - header_bytes
    items, streams = read_index(unpack(packed, size, "the index"), limits)
    coded = fields.take(fields.left, "the streams")
    announced = sum(sum(stream.chunks) for stream in streams)
    if announced != len(coded):
        raise WireError(f"the index announces {announced:,} bytes of streams, the payload has {len(coded):,}")
    return OpenedPayload(header, items, streams, coded, header_bytes, index_bytes)


def _start(payload: bytes, limits: Limits) -> tuple[Header, FieldReader]:
    """The header, and the reader behind it."""
    whole = memoryview(payload).cast("B")
    if len(whole) > limits.max_payload:
        raise WireError(f"a payload of {len(whole):,} bytes is more than the {limits.max_payload:,} that are allowed")
    if bytes(whole[: len(MAGIC)]) != MAGIC or len(whole) <= len(MAGIC) + CHECKSUM_BYTES:
        raise WireError("these bytes are not a fedloom payload: expected FLOM, a version, content and a checksum")
    # The version comes before the checksum, which a later format may compute in another way.
    if whole[len(MAGIC)] != VERSION:
        raise WireError(
            f"the payload is written in version {whole[len(MAGIC)]} of the format, and this fedloom reads version "
            f"{VERSION}: install the same version of fedloom on both sides"
        )
    body = whole[:-CHECKSUM_BYTES]
    if _checksum(slices(body)) != whole[-CHECKSUM_BYTES:]:
        raise WireError("the payload was damaged or cut on its way: its checksum does not match")
    fields = FieldReader(body, "the payload")
    fields.take(len(MAGIC) + 1, "the magic bytes")
    return read_header_fields(fields), fields


def _checksum(pieces: Iterable[bytes | memoryview]) -> bytes:
    hasher = xxhash.xxh3_64()
    for piece in pieces:
        hasher.update(piece)
    return hasher.intdigest().to_bytes(CHECKSUM_BYTES, "little")


def _put_positions(entries: dict[str, Entry]) -> tuple[dict[str, Cells], Sinks]:
    for name, entry in entries.items():
        if isinstance(entry, Seeded):
            check_mask(name, count(entry.shape), entry.density, entry.seed, entry.values.numel())
    sparse = {name: entry for name, entry in entries.items() if isinstance(entry, Sparse)}
    sink = PositionSink(sum(entry.positions.numel() for entry in sparse.values()))
    for entry in sparse.values():
        sink.add(entry.shape, entry.positions.numpy())
    layouts, sinks = sink.finish()
    return dict(zip(sparse, layouts, strict=True)), sinks


def _put_values(entries: dict[str, Entry]) -> Sinks:
    sinks: Sinks = defaultdict(Sink)
    for coding in CODINGS.values():
        values = [entry.values for entry in entries.values() if coding_of(entry.values) is coding]
        if values:
            coding.put(coding, values, sinks)
    return dict(sinks)


def _pack_streams(sinks: Sinks, work: int, smaller: bool, out: Sheet) -> list[Stream]:
    """Write the streams that hold anything, by increasing role: chunks that are packed, or as they are."""
    raw = [(role, number) for role, sink in sorted(sinks.items()) for number in range(sink.chunks)]
    lengths: dict[int, list[int]] = {role: [] for role, _ in raw}

    def packed(some: list[tuple[int, int]]) -> list[bytes | memoryview]:
        chunks = (sinks[role].chunk(number) for role, number in some)
        return [pack(chunk) if smaller else chunk for chunk in chunks]

    for start in range(0, len(raw), _AT_ONCE):
        some = raw[start : start + _AT_ONCE]
        made: list[bytes | memoryview] = [b""] * len(some)
        made[0::2], made[1::2] = run_side_by_side(partial(packed, some[0::2]), partial(packed, some[1::2]), work)
        for (role, _), chunk in zip(some, made, strict=True):
            lengths[role].append(out.write(chunk))
    return [Stream(role, sinks[role].size, tuple(held)) for role, held in lengths.items()]


def _item(name: str, entry: Entry, cells: Cells | None) -> Item:
    values = entry.values
    coding, kept = coding_of(values), values.numel()
    block = values.block if isinstance(values, Quantized) else 0
    if isinstance(entry, Seeded):
        return Item(name, entry.shape, SEEDED, coding, kept, block, None, entry.seed, round(entry.density * STEPS))
    return Item(name, entry.shape, DENSE if cells is None else SPARSE, coding, kept, block, cells)


def _take_positions(items: Sequence[Item], sources: Sources) -> dict[str, Ints]:
    source = PositionSource(sources, [item.cells for item in items if item.cells is not None])
    positions = {item.name: source.take(item.shape, item.cells) for item in items if item.cells is not None}
    source.end()
    for item in items:
        if item.form == SEEDED:
            check_mask(item.name, item.numel, item.threshold / STEPS, item.seed, item.count)
    return positions


def _take_values(items: Sequence[Item], sources: Sources) -> dict[str, Values]:
    values: dict[str, Values] = {}
    for coding in CODINGS.values():
        own = [item for item in items if item.coding is coding]
        taken = coding.get(coding, [item.count for item in own], [item.block for item in own], sources)
        values |= zip((item.name for item in own), taken, strict=True)
    return values


def _entry(item: Item, positions: dict[str, Ints], values: dict[str, Values]) -> Entry:
    if item.form == SPARSE:
        return Sparse(item.shape, tensor_of(positions[item.name]), values[item.name])
    if item.form == SEEDED:
        return Seeded(item.shape, item.seed, item.threshold / STEPS, values[item.name])
    return Dense(item.shape, values[item.name])
