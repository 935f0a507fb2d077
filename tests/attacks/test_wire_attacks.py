"""Hostile payloads: one for every way to fail. README.md lists them; a payload is a message or a WireError."""

import tracemalloc
from pathlib import Path

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_forge import (
    BITMAPS,
    CLASSES,
    EXTRA,
    FIRST_GAPS,
    INT4,
    INT8,
    SEEDED,
    SIGN,
    SPARSE,
    bomb,
    cells,
    forged,
    item,
    scale,
    sealed,
    skippable,
    start,
    with_dictionary,
    with_index,
    words,
)

from fedloom.compress.entries import to_dense
from fedloom.errors import WireError
from fedloom.wire import Limits, Message, decode, describe, encode, read_header
from fedloom.wire.fields import FieldWriter
from fedloom.wire.index import write_index
from fedloom.wire.streams import Stream

HERE = Path(__file__).parent
GOLDEN = {path.stem: bytes.fromhex(path.read_text()) for path in (HERE.parent / "golden" / "wire-v2").glob("*.hex")}
PLAIN = GOLDEN["fp32-dense"]
GAPS = FIRST_GAPS
SKIPPABLE = skippable(4)
SMALL = Limits(max_payload=2**20, max_values=2**16, max_tensors=64, max_bytes=2**19, max_index=2**16)


def sparse_item(*pairs, shape=(4, 4), rows=1, columns=1):
    count = sum(kept for kept, _ in pairs)
    return item(SPARSE, shape, count=count, cells=cells(*pairs, rows=rows, columns=columns))


def names(*rest):
    """An index with these (shared prefix, rest) as names and no more."""
    out = FieldWriter()
    out.varint(len(rest))
    for shared, end in rest:
        out.varint(shared)
        out.sized_bytes(end)
    return bytes(out.data)


def one_stream(role=8, size=4, chunks=(4,)):
    return write_index([item()], [Stream(role, size, chunks)])


ATTACKS = {
    # bytes that are no payload
    "nothing at all": (b"", "not a fedloom payload"),
    "another file": (b"PK\x03\x04" + bytes(40), "not a fedloom payload"),
    "magic alone": (b"FLOM\x02", "not a fedloom payload"),
    "a newer version": (sealed(b"FLOM\x03" + PLAIN[5:-8]), "version 3 of the format"),
    "a newer version with another checksum": (b"FLOM\x07" + PLAIN[5:], "version 7 of the format"),
    "cut short": (PLAIN[:-1], "damaged or cut"),
    "continued": (PLAIN + b"\x00", "damaged or cut"),
    "too long a payload": (bytes(2**20 + 1), "more than the 1,048,576"),
    # header
    "an unknown kind": (sealed(b"FLOM\x02\x09" + bytes(30)), "9 is not a kind"),
    "a method that is no text": (sealed(b"FLOM\x02\x00\x02\xff\xfe" + bytes(30)), "not UTF-8"),
    "a method longer than the payload": (sealed(b"FLOM\x02\x00\x7fabc"), "ends inside the method"),
    "a round above 2^63": (sealed(b"FLOM\x02\x00\x00" + b"\xff" * 9 + b"\x01" + bytes(9)), "not below"),
    "an overlong number": (sealed(b"FLOM\x02\x00\x00" + b"\x80\x00" + bytes(9)), "more bytes than it needs"),
    "a digest of 3 bytes": (sealed(b"FLOM\x02\x00\x00\x00\x00\x00\x03abc" + bytes(9)), "has 3 bytes"),
    "no index": (sealed(start()), "ends inside the size of the index"),
    # index
    "an index larger than allowed": (with_index(b"", claimed=2**40, packed=b"x" * 100), "more than the 65,536"),
    "an index bomb": (with_index(b"", claimed=2**16, packed=bomb(2**30)), "does not announce"),
    "an index that is no frame": (with_index(b"", claimed=100, packed=b"x" * 50), "not a valid Zstandard|not announce"),
    "an index shorter than its packed form": (with_index(b"", claimed=3, packed=b"x" * 50), "cannot stand for"),
    "an index with a tail": (with_index(write_index([], []) + b"\x00"), "after its end"),
    "too many tensors": (with_index(b"\x80\x80\x04"), "more than the 64"),
    "more tensors than the index holds": (with_index(b"\x05"), "ends inside"),
    "a name that comes twice": (with_index(names((0, b"a"), (1, b""))), "must increase"),
    "names out of order": (with_index(names((0, b"b"), (0, b"a"))), "must increase"),
    "a prefix longer than the name before": (with_index(names((0, b"a"), (2, b"b"))), "more than the 1"),
    "a name that is no text": (with_index(names((0, b"\xff"))), "not UTF-8"),
    "a name too long": (with_index(names((0, b"a" * 1025))), "more than the 1,024"),
    "an unknown form": (with_index(names((0, b"a")) + b"\x03\x00"), "form 3"),
    "an unknown coding": (with_index(names((0, b"a")) + b"\x00\x06"), "coding 6"),
    "nine dimensions": (forged([item(shape=(1,) * 9, count=1)]), "more than the 8"),
    "2^31 elements": (forged([item(shape=(2**16, 2**15), count=0)]), "fewer than"),
    "absurd sizes around a 0": (forged([item(shape=(2**31 - 1,) * 7 + (0,), count=0)]), "fewer than"),
    "more elements than allowed": (forged([item(shape=(2**17,))]), "at most 65,536"),
    "more bytes than allowed": (forged([sparse_item((2**16, 1), shape=(2**16,))]), "786,432 bytes when decoded"),
    "more lines in classes than allowed": (
        forged([sparse_item((1, 1), (0, 0), shape=(2**16, 1), rows=2)], [(CLASSES, 2**16, bomb(2**16))]),
        "524,300 bytes when decoded",
    ),
    "blocks of 0 values": (forged([item(coding=INT8, block=0)]), "blocks of 0"),
    "blocks too large": (forged([item(coding=INT8, block=65537)]), "more than the 65,536"),
    # places
    "no row class": (forged([sparse_item(rows=0)]), "0 × 1 classes"),
    "nine column classes": (forged([sparse_item(*[(0, 0)] * 9, columns=9)]), "1 × 9 classes"),
    "more positions than elements": (forged([sparse_item((17, 1))]), "more than the 16"),
    "an empty cell in a gap stream": (forged([sparse_item((0, 1))]), "cannot be in stream"),
    "a gap stream that cannot be": (forged([sparse_item((1, 65))]), "cannot be in stream 65"),
    "a gap stream that is not there": (forged([sparse_item((2, 1))], words(2)), "needed"),
    "a line in a class that is not there": (
        forged(
            [sparse_item((1, 1), (1, 1), rows=2)],
            [(CLASSES, 4, b"\x00\x01\x02\x00"), *words(2), (GAPS, 2, b"\x00\x00")],
        ),
        "class 2 of 2",
    ),
    "more positions than its cell has elements": (
        forged(
            [sparse_item((5, 1), (0, 0), rows=2)], [(CLASSES, 4, b"\x00\x01\x01\x01"), *words(5), (GAPS, 5, bytes(5))]
        ),
        "more positions than elements",
    ),
    "a position behind the end": (forged([sparse_item((2, 1))], [*words(2), (GAPS, 2, b"\x0f\x00")]), "lies outside"),
    "a position behind the end of a small cell": (
        forged(
            [sparse_item((1, 1), (1, 1), rows=2)],
            [(CLASSES, 4, b"\x00\x01\x01\x01"), *words(2), (GAPS, 2, b"\x04\x00")],
        ),
        "outside its cell",
    ),
    "a symbol that is no gap": (forged([sparse_item((1, 1))], [*words(1), (GAPS, 1, b"\xe8")]), "232 is not a gap"),
    "extra bits that are not there": (forged([sparse_item((1, 1))], [*words(1), (GAPS, 1, b"\x12")]), "extra bits"),
    "extra bits of no gap": (
        forged([sparse_item((1, 1))], [(EXTRA, 1, b"\x01"), *words(1), (GAPS, 1, b"\x00")]),
        "belong to no gap",
    ),
    "an ocean of extra bits": (
        forged([sparse_item((1, 1))], [(EXTRA, 2**17, bomb(2**17)), *words(1), (GAPS, 1, b"\x00")]),
        "more than 1 positions can need",
    ),
    "a bitmap with too few bits": (
        forged([sparse_item((5, 0))], [(BITMAPS, 2, b"\x0f\x00"), *words(5)]),
        "4 positions",
    ),
    "a bitmap with too many bits": (
        forged([sparse_item((5, 0))], [(BITMAPS, 2, b"\xff\x00"), *words(5)]),
        "more than its 5",
    ),
    "a bitmap with bits behind its end": (
        forged([sparse_item((5, 0), shape=(3, 3))], [(BITMAPS, 2, b"\x0f\x80"), *words(5)]),
        "more than its 5",
    ),
    "values that the mask does not keep": (
        forged([item(SEEDED, (16,), count=7, seed=5, threshold=65536)], words(7)),
        "mask keeps",
    ),
    "a mask denser than 1": (forged([item(SEEDED, (16,), count=4, threshold=65537)]), "more than the 65,536"),
    # values
    "a 4-bit code of -8": (
        forged([item(coding=INT4, block=4)], [(17, 2, b"\x11\x01"), *[(22 + p, 1, b"\x00") for p in range(4)]]),
        "outside -7 to 7",
    ),
    "an odd 4-bit code with something beside it": (
        forged([item(coding=INT4, shape=(3,), count=3, block=4)], [(17, 2, b"\x11\x11"), *scale(22)]),
        "outside -7 to 7",
    ),
    "bits behind the last sign": (
        forged([item(coding=SIGN, block=4)], [(26, 1, b"\x1f"), *[(27 + p, 1, b"\x00") for p in range(4)]]),
        "follow the last sign",
    ),
    "a scale that is not a number": (
        forged(
            [item(coding=INT8, block=4)],
            [(16, 4, bytes(4)), (18, 1, b"\xff"), *[(19 + p, 1, b"\x00") for p in range(3)]],
        ),
        "a scale is",
    ),
    "a scale of minus zero": (
        forged([item(coding=INT8, block=4)], [(16, 4, bytes(4)), *scale(18, 0x80000000)]),
        "a scale is",
    ),
    "values that are not there": (forged([item()]), "4 are needed"),
    # streams
    "a stream that nobody needs": (forged([], [(8, 4, bytes(4))]), "belong to no tensor"),
    "a stream that is too long": (forged([item(count=3, shape=(3,))], words(4)), "belong to no tensor"),
    "a role that is unknown": (with_index(one_stream(role=96), bytes(4)), "role 96"),
    "a role that comes twice": (
        with_index(write_index([item()], [Stream(8, 4, (4,)), Stream(8, 4, (4,))]), bytes(8)),
        "role 8 cannot come here",
    ),
    "an empty stream": (with_index(one_stream(size=0, chunks=())), "would have more chunks"),
    "a stream of 2^60 bytes": (with_index(one_stream(size=2**60), bytes(4)), "more chunks than the index"),
    "a chunk longer than a chunk": (
        with_index(one_stream(chunks=(2**17 + 1,)), bytes(2**17 + 1)),
        "more than the 131,072",
    ),
    "a chunk of 0 bytes": (with_index(one_stream(chunks=(0,))), "too short"),
    "chunks longer than the payload": (with_index(one_stream(size=2**17, chunks=(500,)), bytes(4)), "announces 500"),
    "bytes after the last chunk": (with_index(one_stream(), bytes(5)), "announces 4"),
    "a chunk that is no frame": (
        forged([item(shape=(30,), count=30)], [(8, 30, b"?" * 20), *words(30)[1:]]),
        "not a valid Zstandard|does not announce",
    ),
    "a chunk that says another size": (
        forged([item(shape=(60000,), count=60000)], [(8, 60000, bomb(2**30)), *words(60000)[1:]]),
        "does not announce",
    ),
    "a frame with a tail": (
        forged([item(shape=(6000,), count=6000)], [(8, 6000, bomb(6000) + b"tail"), *words(6000)[1:]]),
        "not a valid Zstandard",
    ),
    "a frame longer than its content": (
        forged([item(shape=(8,), count=8)], [(8, 8, bomb(8)), *words(8)[1:]]),
        "cannot stand for 8",
    ),
    "two frames": (
        forged([item(shape=(6000,), count=6000)], [(8, 6000, bomb(3000) * 2), *words(6000)[1:]]),
        "does not announce",
    ),
    "a skippable frame before the frame": (
        forged([item(shape=(6000,), count=6000)], [(8, 6000, SKIPPABLE + bomb(6000)), *words(6000)[1:]]),
        "does not announce",
    ),
    "a skippable frame of the right size": (
        forged([item(shape=(6000,), count=6000)], [(8, 6000, skippable(6000)[:5999]), *words(6000)[1:]]),
        "not a valid Zstandard|6,000",
    ),
    "a frame that needs a dictionary": (
        forged([item(shape=(6000,), count=6000)], [(8, 6000, with_dictionary(6000)), *words(6000)[1:]]),
        "not a valid Zstandard",
    ),
    "a frame that does not say its size": (
        forged([item(shape=(6000,), count=6000)], [(8, 6000, bomb(6000, sized=False)), *words(6000)[1:]]),
        "does not announce",
    ),
    "a frame cut short": (
        forged([item(shape=(6000,), count=6000)], [(8, 6000, bomb(6000)[:-1]), *words(6000)[1:]]),
        "not a valid Zstandard",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_attack_is_refused_for_its_reason(attack):
    payload, reason = ATTACKS[attack]
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=reason):
            decode(payload, SMALL)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Twice the largest output that is allowed, and a few chunks: no number of the sender's was believed.
    assert peak < 2 * SMALL.max_bytes + 2**20


def test_lines_without_classes_cost_nothing():
    """Half a billion rows in one class are a number, not a list."""
    where = sparse_item((1, 1), (0, 0), shape=(2**29, 1), columns=2)
    payload = forged([where], [(CLASSES, 1, b"\x00"), *words(1), (GAPS, 1, b"\x05")])
    tracemalloc.start()
    try:
        assert decode(payload).entries["m/A"].positions.tolist() == [5]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_readme_lists_every_attack():
    listed = [
        line.split("|")[1].strip() for line in (HERE / "README.md").read_text().splitlines() if line.startswith("| ")
    ]
    assert listed[1:] == list(ATTACKS)


def test_what_the_forge_makes_of_honest_content_is_read():
    """The attacks fail for their own fault, not for the forge's."""
    payload = forged([sparse_item((2, 1))], [*words(2), (GAPS, 2, b"\x03\x01")])
    assert decode(payload, SMALL).entries["m/A"].positions.tolist() == [3, 5]


@pytest.mark.parametrize("name", ["fp32-dense", "bf16-gaps", "int8-seeded"])
def test_every_cut_and_every_flipped_bit_is_noticed(name):
    payload = GOLDEN[name]
    for length in range(len(payload)):
        with pytest.raises(WireError):
            decode(payload[:length])
    for bit in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode(bytes(damaged))
        with pytest.raises(WireError):
            read_header(bytes(damaged))


def judged(payload):
    """True for a message that can be used and sent on, False for a WireError; anything else escapes."""
    try:
        message = decode(payload, SMALL)
    except WireError:
        return False
    assert read_header(payload, SMALL) == message.header
    assert sum(describe(payload, SMALL).parts.values()) == len(payload)
    for entry in message.entries.values():
        assert to_dense(entry).shape == torch.Size(entry.shape)
    encode(Message(message.header, message.entries))
    return True


@settings(max_examples=300)
@given(st.sampled_from(sorted(GOLDEN)), st.data())
def test_changed_bytes_under_a_right_checksum(name, data):
    body = bytearray(GOLDEN[name][:-8])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(5, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        body += bytes(max(6 - len(body), 0))
    judged(sealed(bytes(body)))


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_index(index):
    judged(with_index(index))


def spent(*arguments):
    raise AssertionError("the reader began before it had looked at what is allowed")


def test_a_mask_is_drawn_only_for_a_payload_that_is_worth_it(monkeypatch):
    """2^30 − 1 elements under a mask took 1.4 s for 107 bytes."""
    monkeypatch.setattr("fedloom.wire.checks.seeded_count", spent)
    payload = forged([item(SEEDED, (2**30 - 1,), count=4, seed=5, threshold=65535)], words(4))
    with pytest.raises(WireError, match="1,073,741,823 elements under seeded masks: at most"):
        decode(payload)


def test_no_number_is_drawn_for_a_mask_of_nothing(monkeypatch):
    monkeypatch.setattr("fedloom.compress.masks._numbers", spent)
    for threshold, kept in ((0, 0), (65536, 3)):
        shape = (3,) if kept else (2**30,)
        payload = forged([item(SEEDED, shape, count=kept, threshold=threshold)], words(kept) if kept else [])
        assert decode(payload).entries["m/A"].values.numel() == kept


def test_a_small_payload_may_not_hold_many_tensors():
    index = write_index([item(shape=(0,), name=f"{number:05d}/A", count=0) for number in range(9000)], [])
    packed = bomb_of(index)
    assert len(packed) < 1000
    with pytest.raises(WireError, match="the number of tensors is 9,000, more than the 8,192"):
        decode(with_index(index, packed=packed))
    assert len(decode(with_index(index)).entries) == 9000


def test_a_small_payload_may_not_hold_a_large_index(monkeypatch):
    monkeypatch.setattr("fedloom.wire.codec.unpack", spent)
    with pytest.raises(WireError, match="the size of the index is 1,048,576, more than the 524,288"):
        decode(with_index(b"", claimed=2**20, packed=bomb(2**20)))


def bomb_of(content):
    return zstandard.ZstdCompressor(level=19).compress(content)
