"""What fedloom does not write, but docs/wire-format.md allows: it is read, here and by the page's own reader."""

import re
from pathlib import Path

import pytest
import zstandard
from wire_forge import BITMAPS, CLASSES, FIRST_GAPS, INT4, INT8, SPARSE, cells, forged, item, scale, with_index, words

from fedloom.compress.entries import floats
from fedloom.errors import WireError
from fedloom.wire import Limits, decode, encode
from fedloom.wire.fields import FieldWriter
from fedloom.wire.index import write_index
from fedloom.wire.streams import CHUNK, Stream

PAGE = (Path(__file__).parent.parent.parent / "docs" / "wire-format.md").read_text()


def packed(raw, **settings):
    return zstandard.ZstdCompressor(**settings).compress(raw)


def names(*shared_and_rest):
    """An index of scalars of coding fp32 with these names."""
    out = FieldWriter()
    out.varint(len(shared_and_rest))
    for shared, rest in shared_and_rest:
        out.varint(shared)
        out.sized_bytes(rest)
    streams = write_index([], [Stream(8 + plane, len(shared_and_rest), (len(shared_and_rest),)) for plane in range(4)])
    return bytes(out.data) + bytes(3 * len(shared_and_rest)) + streams[1:]


def sparse_item(*pairs, **layout):
    return item(SPARSE, (4, 4), count=sum(kept for kept, _ in pairs), cells=cells(*pairs, **layout))


INDEX = write_index([item(shape=(0,), name=f"{number:03d}/A", count=0) for number in range(90)], [])
FREEDOMS = {
    "a chunk with Zstandard's checksum": forged(
        [item(shape=(600,), count=600)], [(8, 600, packed(bytes(600), write_checksum=True)), *words(600)[1:]]
    ),
    "a chunk that could be shorter": forged(
        [item(shape=(600,), count=600)], [(8, 600, packed(bytes(range(200)) * 3, level=-5)), *words(600)[1:]]
    ),
    "an index with Zstandard's checksum": with_index(INDEX, packed=packed(INDEX, write_checksum=True)),
    "a prefix that is not the longest": with_index(names((0, b"aab"), (1, b"ac")), bytes(8)),
    "an empty name": with_index(names((0, b""), (0, b"a")), bytes(8)),
    "a last chunk of one byte": with_index(
        write_index([item(shape=(CHUNK + 1,))], [Stream(8 + plane, CHUNK + 1, (CHUNK, 1)) for plane in range(4)]),
        bytes(4 * CHUNK + 4),
    ),
    "an odd number of 4-bit codes": forged(
        [item(coding=INT4, shape=(3,), count=3, block=4)], [(17, 2, b"\x1f\x08"), *scale(22, 0x3F800000)]
    ),
    "an 8-bit code of -128": forged(
        [item(coding=INT8, block=4)], [(16, 4, b"\x80\x7f\x00\x01"), *scale(18, 0x3F800000)]
    ),
    "a class without a line": forged(
        [sparse_item((1, 1), (0, 0), (0, 0), rows=3)], [(CLASSES, 4, bytes(4)), *words(1), (FIRST_GAPS, 1, b"\x05")]
    ),
    "a bitmap of few positions": forged([sparse_item((1, 0))], [(BITMAPS, 2, b"\x10\x00"), *words(1)]),
    "gaps of many positions": forged([sparse_item((16, 64))], [*words(16), (FIRST_GAPS + 63, 16, bytes(16))]),
}


@pytest.mark.parametrize("freedom", FREEDOMS)
def test_what_the_page_allows_is_read(freedom):
    payload = FREEDOMS[freedom]
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], scope)
    read = decode(payload)
    tensors = scope["read"](payload)
    assert list(tensors) == list(read.entries)
    for name, entry in read.entries.items():
        shape, values, where = tensors[name]
        assert shape == entry.shape and floats(entry.values).tolist() == list(values)
        assert where is None or where == entry.positions.tolist()
    again = encode(read)
    assert encode(decode(again)) == again


def test_a_frame_of_the_wrong_checksum_is_refused():
    frame = bytearray(packed(bytes(600), write_checksum=True))
    frame[-1] ^= 1
    with pytest.raises(WireError, match="not a valid Zstandard"):
        decode(forged([item(shape=(600,), count=600)], [(8, 600, bytes(frame)), *words(600)[1:]]))


def number(cell):
    power = {"⁰": 0, "¹": 1, "²": 2, "³": 3, "⁴": 4, "⁶": 6, "⁸": 8, "⁹": 9}
    return 2 ** int("".join(str(power[digit]) for digit in cell.strip().removeprefix("2")))


def test_the_limits_on_the_page_are_those_of_the_code():
    rows = re.findall(r"^\| [^|]+ \| `(max_\w+)` \| ([^|]+) \|([^|]*)\|$", PAGE, re.MULTILINE)
    written = {name: number(most) for name, most, _ in rows}
    assert written == {name: getattr(Limits(), name) for name in Limits.__slots__}
    size = 10**6
    given = Limits().of_payload(size)
    assert "max(2¹³, ⌊n / 4⌋)" in PAGE and given.max_tensors == max(2**13, size // 4)
    assert "max(2¹⁹, 8 n)" in PAGE and given.max_index == max(2**19, 8 * size)
    assert "2²⁴ + 2¹³ n" in PAGE and Limits().of_payload(1000).max_drawn == 2**24 + 2**13 * 1000
