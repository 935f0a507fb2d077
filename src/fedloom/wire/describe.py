"""What a payload spends its bytes on, from its index alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedloom.compress.entries import count
from fedloom.wire.codec import CHECKSUM_BYTES, OpenedPayload, open_payload
from fedloom.wire.index import DENSE, SEEDED, SPARSE, Item
from fedloom.wire.limits import DEFAULT, Limits
from fedloom.wire.message import Header
from fedloom.wire.positions import BITMAPS, CLASSES, EXTRA, FIRST_GAPS
from fedloom.wire.values import SCALES

FORMS = {DENSE: "dense", SPARSE: "sparse", SEEDED: "seeded"}


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """One tensor of a payload.

    values: how many are sent, of coding `coding`; density: their share of the tensor's elements. position_bytes and
    value_bytes are its share, by unpacked size, of the streams that it is in: streams are packed across tensors.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    coding: str
    values: int
    density: float
    positions: str
    position_bytes: float
    value_bytes: float


@dataclass(frozen=True, slots=True)
class Description:
    """A payload in numbers. The parts (header, index, positions, values, checksum) add up to `size` bytes."""

    header: Header
    size: int
    parts: Mapping[str, int]
    tensors: tuple[TensorBytes, ...]
    checksum: str


def describe(payload: bytes, limits: Limits = DEFAULT) -> Description:
    """The parts of a payload. Raises WireError like `decode`; unpacks the index only."""
    opened = open_payload(payload, limits)
    packed = {stream.role: sum(stream.chunks) for stream in opened.streams}
    positions = sum(size for role, size in packed.items() if _is_position(role))
    parts = {
        "header": opened.header_bytes,
        "index": opened.index_bytes,
        "positions": positions,
        "values": sum(packed.values()) - positions,
        "checksum": CHECKSUM_BYTES,
    }
    checksum = bytes(memoryview(payload)[-CHECKSUM_BYTES:])[::-1].hex()
    return Description(opened.header, len(payload), parts, _tensors(opened), checksum)


def _is_position(role: int) -> bool:
    return role in (CLASSES, BITMAPS, EXTRA) or role >= FIRST_GAPS


def _tensors(opened: OpenedPayload) -> tuple[TensorBytes, ...]:
    rate = {stream.role: sum(stream.chunks) / stream.size for stream in opened.streams}
    # Class lists, bitmaps and extra bits are not told apart by tensor in the index: they are shared out by positions.
    shared = sum(sum(stream.chunks) for stream in opened.streams if stream.role in (CLASSES, BITMAPS, EXTRA))
    sparse = sum(item.count for item in opened.items if item.form == SPARSE)
    each = shared / sparse if sparse else 0.0
    return tuple(_tensor(item, rate, each) for item in opened.items)


def _tensor(item: Item, rate: Mapping[int, float], each: float) -> TensorBytes:
    position_bytes = each * item.count if item.cells else 0.0
    for cell in item.cells.cells if item.cells else ():
        position_bytes += cell.count * rate[FIRST_GAPS + cell.stream - 1] if cell.stream else 0.0
    coding = item.coding
    planes = [rate.get(coding.role + plane, 0.0) for plane in range(coding.planes)]
    value_bytes = item.count * coding.plane_bits / 8 * sum(planes)
    if coding.bits:
        value_bytes += item.scales * sum(rate.get(SCALES[coding.bits] + plane, 0.0) for plane in range(4))
    numel = count(item.shape)
    return TensorBytes(
        item.name,
        FORMS[item.form],
        item.shape,
        coding.name,
        item.count,
        item.count / numel if numel else 0.0,
        _layout(item),
        position_bytes,
        value_bytes,
    )


def _layout(item: Item) -> str:
    """How the positions are coded, in words."""
    if item.cells is None:
        return {DENSE: "none", SEEDED: "seed"}[item.form]
    classes = f"{item.cells.row_classes} x {item.cells.column_classes} classes"
    return "gaps" if len(item.cells.cells) == 1 else f"gaps in {classes}"
