"""Payloads that no honest sender writes: any index with any chunks, under a checksum that is right."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash
import zstandard

from fedloom.wire.fields import FieldWriter
from fedloom.wire.index import DENSE, SEEDED, SPARSE, Item, write_header, write_index
from fedloom.wire.message import Header
from fedloom.wire.positions import BITMAPS, CLASSES, EXTRA, FIRST_GAPS, Cell, Cells
from fedloom.wire.streams import Stream
from fedloom.wire.values import CODINGS

HEADER = Header("update", "fedsrd", 1, 0, "0" * 32, num_examples=1)
FP32, INT8, INT4, SIGN = CODINGS[0], CODINGS[3], CODINGS[4], CODINGS[5]
__all__ = ["BITMAPS", "CLASSES", "DENSE", "EXTRA", "FIRST_GAPS", "FP32", "INT4", "INT8", "SEEDED", "SIGN", "SPARSE"]


def sealed(body: bytes) -> bytes:
    """A body and its checksum."""
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def start(header: Header = HEADER) -> bytes:
    """Everything before the index."""
    out = FieldWriter()
    out.data += b"FLOM\x02"
    write_header(out, header)
    return bytes(out.data)


def with_index(index: bytes, chunks: bytes = b"", *, claimed: int | None = None, packed: bytes | None = None) -> bytes:
    """A payload of this unpacked index; `claimed` is the size that it announces, `packed` what stands for it."""
    out = FieldWriter()
    out.varint(len(index) if claimed is None else claimed)
    out.sized_bytes(index if packed is None else packed)
    return sealed(start() + bytes(out.data) + chunks)


def forged(items: Sequence[Item], streams: Sequence[tuple[int, int, bytes]] = ()) -> bytes:
    """A payload of these tensors, and streams of one chunk: (role, unpacked size, chunk)."""
    announced = [Stream(role, size, (len(chunk),)) for role, size, chunk in streams]
    return with_index(write_index(items, announced), b"".join(chunk for _, _, chunk in streams))


def item(
    form: int = DENSE, shape: tuple[int, ...] = (4,), *, name: str = "m/A", count: int = 4, **other: object
) -> Item:
    """A tensor of the index."""
    return Item(name, shape, form, other.pop("coding", FP32), count, **other)  # type: ignore[arg-type]


def cells(*counts_and_streams: tuple[int, int], rows: int = 1, columns: int = 1) -> Cells:
    """The cells of a sparse tensor."""
    return Cells(rows, columns, tuple(Cell(*pair) for pair in counts_and_streams))


def words(count: int) -> list[tuple[int, int, bytes]]:
    """The four planes of so many zeros, stored as they are."""
    return [(8 + plane, count, bytes(count)) for plane in range(4)]


def scale(role: int, word: int = 0) -> list[tuple[int, int, bytes]]:
    """The four planes of one float32 scale of these bits."""
    rotated = (word << 1 | word >> 31) & 0xFFFFFFFF
    return [(role + plane, 1, bytes([rotated >> 24 - 8 * plane & 0xFF])) for plane in range(4)]


def bomb(size: int, *, sized: bool = True) -> bytes:
    """A small frame that says (if `sized`), and unpacks to, `size` zeros."""
    return zstandard.ZstdCompressor(level=19, write_content_size=sized).compress(bytes(size))


def skippable(size: int) -> bytes:
    """A frame that readers of Zstandard skip."""
    return (0x184D2A50).to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(size)


def with_dictionary(size: int) -> bytes:
    """A frame of `size` zeros that names a dictionary, number 7."""
    frame = bytearray(bomb(size))
    assert not frame[4] & 0b11
    frame[4] |= 0b01
    single_segment = frame[4] & 0b00100000
    at = 5 if single_segment else 6
    frame[at:at] = b"\x07"
    return bytes(frame)
