"""The header, and the index that says what every tensor is and where its bytes are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.compress.entries import count
from fedloom.compress.masks import STEPS
from fedloom.errors import WireError
from fedloom.wire.cells import MOST_CLASSES, matrix_shape
from fedloom.wire.fields import FieldReader, FieldWriter, decode_text
from fedloom.wire.limits import Limits
from fedloom.wire.message import Header
from fedloom.wire.positions import FIRST_GAPS, MOST_GAP_STREAMS, Cell, Cells
from fedloom.wire.streams import CHUNK, MOST_EXPANSION, Stream
from fedloom.wire.values import CODINGS, MOST_BLOCK, ValueCoding

KINDS = ("update", "change", "state")
DENSE, SPARSE, SEEDED = 0, 1, 2
MOST_NAME, MOST_METHOD, MOST_DIMENSIONS = 1024, 255, 8
ELEMENTS_END = 2**31
"""A tensor has fewer elements than this."""

_DIGEST = re.compile("(?:[0-9a-f]{32})?")


def is_too_large(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape cannot travel. Sizes of 0 count as 1, so that no other size can be absurd."""
    return count(tuple(max(size, 1) for size in shape)) >= ELEMENTS_END


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor in the index. `form` is DENSE, SPARSE or SEEDED; `count` its number of values.

    block: values that share a scale, 0 where the coding has none. cells: of a sparse tensor. seed, threshold
    (65536 × density): of a seeded one.
    """

    name: str
    shape: tuple[int, ...]
    form: int
    coding: ValueCoding
    count: int
    block: int = 0
    cells: Cells | None = None
    seed: int = 0
    threshold: int = 0

    @property
    def numel(self) -> int:
        """Elements of the tensor, zeros included."""
        return count(self.shape)

    @property
    def scales(self) -> int:
        """Number of scales."""
        return -(-self.count // self.block) if self.block else 0

    @property
    def output_bytes(self) -> int:
        """What decoding the entry takes: its values, scales and positions, and 8 bytes for every line in a class."""
        values = self.coding.output_bytes * self.count + 4 * self.scales
        if self.cells is None:
            return values
        rows, columns = matrix_shape(self.shape)
        lines = rows * (self.cells.row_classes > 1) + columns * (self.cells.column_classes > 1)
        return values + 8 * self.count + 8 * lines

    @property
    def drawn(self) -> int:
        """Numbers that are drawn to learn what the mask keeps; of all or nothing none are."""
        return self.numel if self.form == SEEDED and 0 < self.threshold < STEPS else 0


@dataclass(slots=True)
class Demand:
    """What the tensors of a message ask of a reader, one after the other."""

    tensors: int = 0
    values: int = 0
    size: int = 0
    drawn: int = 0

    def add(self, item: Item) -> None:
        """Count one more."""
        self.tensors += 1
        self.values += item.numel
        self.size += item.output_bytes
        self.drawn += item.drawn

    def refusal(self, limits: Limits, index: int = 0) -> str:
        """What of all this, and of so many bytes of index, is more than `limits` allow; "" where nothing is."""
        for asked, what, most in (
            (self.tensors, "tensors", limits.max_tensors),
            (self.values, "elements", limits.max_values),
            (self.size, "bytes when decoded", limits.max_bytes),
            (self.drawn, "elements under seeded masks", limits.max_drawn),
            (index, "bytes of index", limits.max_index),
        ):
            if asked > most:
                return f"{asked:,} {what}: at most {most:,} are allowed"
        return ""


def write_header(out: FieldWriter, header: Header) -> None:
    """Append the header."""
    if header.kind not in KINDS:
        raise WireError(f"a message of kind {header.kind!r} cannot be sent: expected one of {', '.join(KINDS)}")
    try:
        method = header.method.encode()
    except UnicodeEncodeError as error:
        raise WireError(f"the method's name {header.method!r} cannot be sent: {error}") from error
    if len(method) > MOST_METHOD:
        raise WireError(f"a method's name of {len(method)} bytes cannot be sent: expected at most {MOST_METHOD}")
    out.byte(KINDS.index(header.kind))
    out.sized_bytes(method)
    for number in (header.round, header.base_version, header.num_examples):
        out.varint(number)
    for digest in (header.base_digest, header.result_digest):
        if not _DIGEST.fullmatch(digest):
            raise WireError(f"the digest {digest!r} cannot be sent: expected 32 lower-case hex digits, or none")
        out.sized_bytes(bytes.fromhex(digest))


def read_header_fields(fields: FieldReader) -> Header:
    """The header at the front."""
    kind = fields.byte("the message's kind")
    if kind >= len(KINDS):
        raise WireError(f"{kind} is not a kind of message: expected 0 to {len(KINDS) - 1}")
    method = decode_text(fields.sized_bytes("the method's name", MOST_METHOD), "the method's name")
    round_, version, examples = (fields.varint(what) for what in ("the round", "the base version", "num_examples"))
    base, result = (_digest(fields, what) for what in ("the base digest", "the result digest"))
    return Header(KINDS[kind], method, round_, version, base, result, examples)  # type: ignore[arg-type]


def _digest(fields: FieldReader, what: str) -> str:
    digest = fields.sized_bytes(what, 16)
    if len(digest) not in (0, 16):
        raise WireError(f"{what} has {len(digest)} bytes: expected 16 or none")
    return digest.hex()


def write_index(items: Sequence[Item], streams: Sequence[Stream]) -> bytes:
    """The unpacked index."""
    out = FieldWriter()
    out.varint(len(items))
    before = b""
    for item in items:
        name = item.name.encode()
        shared = _shared_prefix(before, name)
        out.varint(shared)
        out.sized_bytes(name[shared:])
        before = name
    for item in items:
        _write_item(out, item)
    out.varint(len(streams))
    for stream in streams:
        out.byte(stream.role)
        out.varint(stream.size)
        for length in stream.chunks:
            out.varint(length)
    return bytes(out.data)


def _shared_prefix(left: bytes, right: bytes) -> int:
    """How many bytes they begin with alike: as numbers they differ from the first other byte on."""
    size = min(len(left), len(right))
    other = int.from_bytes(left[:size], "big") ^ int.from_bytes(right[:size], "big")
    return size - (other.bit_length() + 7) // 8


def _write_item(out: FieldWriter, item: Item) -> None:
    out.byte(item.form)
    out.byte(item.coding.number)
    out.varint(len(item.shape))
    for size in item.shape:
        out.varint(size)
    if item.coding.bits:
        out.varint(item.block)
    if item.form == SEEDED:
        out.data += item.seed.to_bytes(8, "little")
        out.varint(item.threshold)
        out.varint(item.count)
    if item.cells is not None:
        out.byte(item.cells.row_classes)
        out.byte(item.cells.column_classes)
        for cell in item.cells.cells:
            out.varint(cell.count)
            out.byte(cell.stream)


def read_index(raw: memoryview, limits: Limits) -> tuple[list[Item], list[Stream]]:
    """The tensors by increasing name and the streams by increasing role, all of it within `limits`."""
    fields = FieldReader(raw, "the index")
    number = fields.varint("the number of tensors", limits.max_tensors)
    names = _read_names(fields, number)
    items: list[Item] = []
    asked = Demand()
    for name in names:
        try:
            item = _read_item(fields, name)
        except WireError as error:
            raise WireError(f"tensor {name!r}: {error}") from error
        asked.add(item)
        if refusal := asked.refusal(limits):
            raise WireError(f"the payload has, up to tensor {name!r}, {refusal}")
        items.append(item)
    streams = _read_streams(fields)
    fields.end()
    return items, streams


def _read_names(fields: FieldReader, number: int) -> list[str]:
    names: list[str] = []
    before: bytes | None = None
    for _ in range(number):
        shared = fields.varint("a name's shared prefix", len(before or b""))
        name = (before or b"")[:shared] + fields.sized_bytes("a name", MOST_NAME - shared)
        if before is not None and name <= before:
            raise WireError(f"the name {name!r} does not come after {before!r}: names must increase")
        names.append(decode_text(name, "a tensor's name"))
        before = name
    return names


def _read_item(fields: FieldReader, name: str) -> Item:
    form, number = fields.byte("its form"), fields.byte("its value coding")
    if form > SEEDED or number not in CODINGS:
        raise WireError(f"form {form} with value coding {number} is unknown")
    coding = CODINGS[number]
    shape = tuple(
        fields.varint("one of its sizes", ELEMENTS_END - 1)
        for _ in range(fields.varint("the number of its dimensions", MOST_DIMENSIONS))
    )
    if is_too_large(shape):
        raise WireError(f"shape {shape} has too many elements: fewer than {ELEMENTS_END:,} are allowed")
    numel = count(shape)
    block = fields.varint("its block", MOST_BLOCK) if coding.bits else 0
    if coding.bits and not block:
        raise WireError("blocks of 0 values")
    if form == SEEDED:
        seed = int.from_bytes(fields.take(8, "its seed"), "little")
        threshold = fields.varint("its density", STEPS)
        kept = fields.varint("its number of values", numel)
        return Item(name, shape, form, coding, kept, block, None, seed, threshold)
    if form == SPARSE:
        cells = _read_cells(fields, numel)
        return Item(name, shape, form, coding, cells.count, block, cells)
    return Item(name, shape, form, coding, numel, block)


def _read_cells(fields: FieldReader, numel: int) -> Cells:
    rows, columns = fields.byte("its row classes"), fields.byte("its column classes")
    if not (1 <= rows <= MOST_CLASSES and 1 <= columns <= MOST_CLASSES):
        raise WireError(f"{rows} × {columns} classes: expected 1 to {MOST_CLASSES} of each")
    cells = []
    left = numel
    for _ in range(rows * columns):
        kept = fields.varint("the number of positions in a cell", left)
        stream = fields.byte("a cell's stream")
        if stream > MOST_GAP_STREAMS or (stream and not kept):
            raise WireError(f"a cell of {kept} positions cannot be in stream {stream}")
        left -= kept
        cells.append(Cell(kept, stream))
    return Cells(rows, columns, tuple(cells))


def _read_streams(fields: FieldReader) -> list[Stream]:
    streams: list[Stream] = []
    for _ in range(fields.varint("the number of streams", 256)):
        role = fields.byte("a stream's role")
        if role >= FIRST_GAPS + MOST_GAP_STREAMS or (streams and role <= streams[-1].role):
            raise WireError(f"a stream of role {role} cannot come here: roles must be known and increase")
        size = fields.varint(f"the size of stream {role}")
        chunks = -(-size // CHUNK)
        if not size or chunks > fields.left:
            raise WireError(f"stream {role} of {size:,} bytes would have more chunks than the index has room for")
        lengths = tuple(fields.varint("a chunk's length", CHUNK) for _ in range(chunks))
        for number, length in enumerate(lengths):
            if length * MOST_EXPANSION < min(CHUNK, size - number * CHUNK):  # the last chunk may hold a single byte
                raise WireError(f"a chunk of stream {role} is too short for what it should hold")
        streams.append(Stream(role, size, lengths))
    return streams
