"""Ways to spoil a payload under a right checksum: of its bytes, and of its parts.

Every kind is a function of a parent, a second parent, and a generator; it gives the payload. Those in `OF_BYTES`
need no parent that can be opened.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import xxhash
import zstandard

from fedloom.errors import WireError
from fedloom.wire.codec import open_payload
from fedloom.wire.fields import FieldWriter
from fedloom.wire.index import Item, write_index
from fedloom.wire.positions import Cell, Cells
from fedloom.wire.streams import CHUNK, Stream, unpack
from fedloom.wire.values import CODINGS

EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 255, 2**16 - 1, 2**16, CHUNK - 1, CHUNK, CHUNK + 1, 2**20, 2**24, 2**29, 2**30)
HUGE = (2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1)
VARINTS = [bytes.fromhex(text) for text in ("00", "01", "7f", "8001", "8000", "ffff03", "ffffffff07", "ff" * 8 + "7f")]
VARINTS += [b"\xff" * 9 + b"\x01", b"\x80" * 40]


@dataclass(frozen=True, eq=False, slots=True)
class Parent:
    """A payload in parts: what comes before the index, the index as items and streams, and every stream's chunks."""

    payload: bytes
    head: bytes
    items: list[Item]
    streams: list[Stream]
    chunks: list[list[bytes]]

    @property
    def index(self) -> bytes:
        return write_index(self.items, self.streams)

    @property
    def coded(self) -> bytes:
        return b"".join(chunk for chunks in self.chunks for chunk in chunks)


def opened(payload: bytes) -> Parent:
    """The parts of a payload; one that cannot be opened has none."""
    try:
        whole = open_payload(payload)
    except WireError:
        return Parent(payload, b"", [], [], [])
    at, chunks = 0, []
    for stream in whole.streams:
        chunks.append([])
        for length in stream.chunks:
            chunks[-1].append(bytes(whole.coded[at : at + length]))
            at += length
    return Parent(payload, payload[: whole.header_bytes], whole.items, whole.streams, chunks)


def sealed(body: bytes) -> bytes:
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def put_together(head: bytes, index: bytes, coded: bytes, rng: random.Random) -> bytes:
    """A payload of these parts, its index as it is or packed."""
    packed = zstandard.compress(index, 1) if rng.random() < 0.3 else index
    out = FieldWriter()
    out.data += head
    out.varint(len(index))
    out.sized_bytes(packed if len(packed) < len(index) else index)
    return sealed(bytes(out.data) + coded)


def number(rng: random.Random, near: int = 0) -> int:
    """One at an edge, or near another one."""
    return rng.choice((rng.choice(EDGES), rng.choice(HUGE), max(near + rng.choice((-1, 1, 8)), 0), rng.randrange(300)))


# Of bytes


def edit_bytes(data: bytes, rng: random.Random, edits: Sequence[Callable], first: int = 0) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(first, max(len(out), first + 1))
        rng.choice(edits)(out, at, rng)
    return bytes(out)


def flip(out: bytearray, at: int, rng: random.Random) -> None:
    if at < len(out):
        out[at] = rng.choice((out[at] ^ 1 << rng.randrange(8), rng.randrange(256), (out[at] + 1) % 256))


def cut(out: bytearray, at: int, rng: random.Random) -> None:
    del out[at : rng.choice((at + 1, at + 2, at + 8, at + rng.randrange(1, 40), len(out)))]


def insert(out: bytearray, at: int, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 16))
    out[at:at] = rng.choice((out[at : at + size], rng.randbytes(size), bytes(size)))


def put_varint(out: bytearray, at: int, rng: random.Random) -> None:
    out[at : at + rng.randrange(4)] = rng.choice(VARINTS)


EDITS = (flip, cut, insert, put_varint)


def anywhere(edit: Callable) -> Callable[[Parent, Parent, random.Random], bytes]:
    """One kind of edit, anywhere behind the version."""
    return lambda parent, other, rng: sealed(edit_bytes(parent.payload[:-8], rng, (edit,), first=5))


def raw_index(parent: Parent, other: Parent, rng: random.Random) -> bytes:
    """The unpacked index, edited."""
    return put_together(parent.head, edit_bytes(parent.index, rng, EDITS), parent.coded, rng)


def header(parent: Parent, other: Parent, rng: random.Random) -> bytes:
    """The header's bytes edited; mostly its method and numbers."""
    return put_together(edit_bytes(parent.head, rng, EDITS, first=5), parent.index, parent.coded, rng)


def splice(parent: Parent, other: Parent, rng: random.Random) -> bytes:
    """Parts of two payloads, or the front of one and the back of another."""
    if rng.random() < 0.5:
        left, right = parent.payload[:-8], other.payload[:-8]
        return sealed(left[: rng.randrange(5, len(left) + 1)] + right[rng.randrange(5, len(right) + 1) :])
    items = [rng.choice((parent, other)).items, rng.choice((parent, other)).streams]
    return put_together(rng.choice((parent, other)).head, write_index(*items), rng.choice((parent, other)).coded, rng)


# Of the index


def change_item(change: Callable[[Item, random.Random], Item]) -> Callable[[Parent, Parent, random.Random], bytes]:
    """One tensor of the index changed."""

    def changed(parent: Parent, other: Parent, rng: random.Random) -> bytes:
        items = list(parent.items)
        if items:
            at = rng.randrange(len(items))
            items[at] = change(items[at], rng)
        return put_together(parent.head, write_index(items, parent.streams), parent.coded, rng)

    return changed


def shape(item: Item, rng: random.Random) -> Item:
    """One size changed, added or left out; or all of them in one."""
    sizes, at = list(item.shape), rng.randrange(len(item.shape) + 1)
    edit = rng.randrange(4)
    if edit == 0 and at < len(sizes):
        sizes[at] = number(rng, sizes[at])
    elif edit == 1:
        sizes.insert(at, rng.choice((0, 1, 1, 2, 2**20)))
    elif edit == 2:
        del sizes[at : at + 1]
    else:
        sizes = [item.numel]
    return replace(item, shape=tuple(sizes))


def name(item: Item, rng: random.Random) -> Item:
    """Empty, long, strange, or out of order."""
    names = (
        "",
        "m",
        "m/A",
        "~" * 1024,
        "~" * 1025,
        "é",
        "\x00",
        item.name + "/",
        item.name[:-1],
        "m" * rng.randrange(99),
    )
    return replace(item, name=rng.choice(names))


def form(item: Item, rng: random.Random) -> Item:
    """Another form, coding, count, block, seed or density."""
    key = rng.choice(("form", "coding", "count", "block", "seed", "threshold"))
    values = {
        "form": rng.randrange(3),
        "coding": rng.choice(list(CODINGS.values())),
        "count": number(rng, item.count),
        "block": number(rng, item.block),
        "seed": rng.getrandbits(64),
        "threshold": number(rng, item.threshold),
    }
    return replace(item, **{key: values[key]})


def cells(item: Item, rng: random.Random) -> Item:
    """Other classes, counts or streams of cells."""
    old = item.cells or Cells(1, 1, (Cell(item.count, 1),))
    own = list(old.cells)
    at = rng.randrange(len(own))
    own[at] = rng.choice((Cell(number(rng, own[at].count), own[at].stream), Cell(own[at].count, rng.randrange(70))))
    rows, columns = rng.choice(((old.row_classes, old.column_classes), (rng.randrange(10), old.column_classes), (1, 9)))
    if rng.random() < 0.5:
        own = (own * 64)[: rows * columns]
    return replace(item, form=1, cells=Cells(rows, columns, tuple(own)))


# Of the streams


def roles(parent: Parent, other: Parent, rng: random.Random) -> bytes:
    """A stream of another role, twice, gone, or in another place."""
    streams, chunks = list(parent.streams), list(parent.chunks)
    if streams:
        at = rng.randrange(len(streams))
        edit = rng.randrange(4)
        if edit == 0:
            streams[at] = replace(streams[at], role=rng.randrange(100))
        elif edit == 1:
            streams.insert(at, replace(streams[at], role=max(streams[at].role - 1, 0)))
            chunks.insert(at, chunks[at])
        elif edit == 2:
            del streams[at], chunks[at]
        else:
            streams.reverse()
    return put_together(parent.head, write_index(parent.items, streams), b"".join(sum(chunks, [])), rng)


def sizes(parent: Parent, other: Parent, rng: random.Random) -> bytes:
    """A stream that says another size, or other lengths of its chunks."""
    streams = list(parent.streams)
    if streams:
        at = rng.randrange(len(streams))
        size, lengths = streams[at].size, list(streams[at].chunks)
        if rng.random() < 0.5:
            size = number(rng, size)
        else:
            lengths[rng.randrange(len(lengths))] = number(rng, lengths[0])
        if rng.random() < 0.3:
            lengths = (lengths * 3)[: -(-min(size, 2**20) // CHUNK)]
        streams[at] = Stream(streams[at].role, size, tuple(lengths))
    return put_together(parent.head, write_index(parent.items, streams), parent.coded, rng)


def content(parent: Parent, other: Parent, rng: random.Random) -> bytes:
    """What a chunk holds, edited."""
    return with_chunk(parent, rng, lambda raw: edit_bytes(raw, rng, EDITS)[:CHUNK] or b"\x00", frame=False)


def frames(parent: Parent, other: Parent, rng: random.Random) -> bytes:
    """A chunk packed in other ways, most of them such as are not allowed."""
    return with_chunk(parent, rng, lambda raw: spoilt_frame(raw, rng), frame=True)


def spoilt_frame(raw: bytes, rng: random.Random) -> bytes:
    sized, checked = rng.random() < 0.8, rng.random() < 0.3
    frame = zstandard.ZstdCompressor(
        level=rng.choice((-5, 1, 3, 19)), write_content_size=sized, write_checksum=checked
    ).compress(raw)
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00" + bytes(4)
    return rng.choice(
        (
            frame,
            frame,
            frame[:-1],
            frame + frame,
            skippable + frame,
            frame + skippable,
            frame + b"\x00",
            edit_bytes(frame, rng, EDITS),
            edit_bytes(frame, rng, (flip,), first=4),
            zstandard.compress(raw * 2),
            zstandard.compress(bytes(2**20)),
        )
    )[:CHUNK]


def with_chunk(parent: Parent, rng: random.Random, change: Callable[[bytes], bytes], *, frame: bool) -> bytes:
    """The last chunk of a stream changed. A frame keeps the size that the index says; content mostly."""
    streams, chunks = list(parent.streams), [list(own) for own in parent.chunks]
    if streams:
        at = rng.randrange(len(streams))
        stream = streams[at]
        before = (len(stream.chunks) - 1) * CHUNK
        size = stream.size - before
        changed = change(bytes(unpack(memoryview(chunks[at][-1]), size, "a chunk")))
        if not frame:
            changed = changed[:size].ljust(size, b"\x01") if rng.random() < 0.7 else changed
            size = len(changed)
        chunks[at][-1] = changed
        streams[at] = Stream(stream.role, before + size, (*stream.chunks[:-1], len(changed)))
    return put_together(parent.head, write_index(parent.items, streams), b"".join(sum(chunks, [])), rng)


OF_BYTES = {
    "flips": anywhere(flip),
    "cuts": anywhere(cut),
    "inserts": anywhere(insert),
    "varints": anywhere(put_varint),
}
KINDS: dict[str, Callable[[Parent, Parent, random.Random], bytes]] = {
    **OF_BYTES,
    "header": header,
    "raw index": raw_index,
    "shapes": change_item(shape),
    "names": change_item(name),
    "forms": change_item(form),
    "cells": change_item(cells),
    "roles": roles,
    "sizes": sizes,
    "content": content,
    "frames": frames,
    "splices": splice,
}
