"""Streams of every role and every length around a chunk's end arrive as they were sent."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.entries import Dense, Quantized, Sparse
from fedloom.wire import Message, decode, encode
from fedloom.wire.codec import open_payload
from fedloom.wire.positions import BITMAPS, CLASSES, EXTRA, FIRST_GAPS
from fedloom.wire.streams import CHUNK
from wire_samples import HEADER, equal

STEPS = (-1, 0, 1, 2)
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def floats(kind):
    def build(length, random):
        words = torch.from_numpy(random.integers(0, 256, length * FLOATS[kind].itemsize, dtype=np.uint8))
        return Dense((length,), words.view(FLOATS[kind]))

    return build


def codes(bits, count, random, block):
    """Codes that use their whole range, and scales of any bits that a scale may have."""
    levels = {8: np.arange(-128, 128), 4: np.arange(-7, 8), 1: np.array([-1, 1])}[bits]
    scales = random.integers(0, 0x7F800000, -(-count // block), dtype=np.int32)
    return Quantized(
        torch.from_numpy(random.choice(levels, count).astype(np.int8)),
        torch.from_numpy(scales).view(torch.float32),
        block,
        bits,
    )


def integers(bits):
    def build(length, random):
        per_byte = 8 // bits
        count = per_byte * length - int(random.integers(per_byte))
        return Dense((count,), codes(bits, count, random, 4096))

    return build


def scales(bits):
    def build(length, random):
        return Dense((length,), codes(bits, length, random, 1))

    return build


def at(positions, shape):
    where = torch.from_numpy(np.asarray(positions, dtype=np.int64))
    return Sparse(shape, where, torch.ones(where.numel(), dtype=torch.bfloat16))


def gaps(length, random):
    steps = random.integers(5, 9, length)
    return at(np.cumsum(steps), (int(steps.sum()) + 9,))


def extra(length, random):
    """Gaps of 2048 to 4095 have 8 extra bits."""
    steps = random.integers(2049, 2100, length)
    return at(np.cumsum(steps) - 1, (int(steps.sum()),))


def bitmap(length, random):
    size = 8 * length - int(random.integers(8))
    return at(np.flatnonzero(random.random(size) < 0.5), (size,))


def rows(length, random):
    full = random.random((length, 1)) < 0.5
    return at(np.flatnonzero((random.random((length, 12)) < 0.9) & full), (length, 12))


def columns(length, random):
    full = random.random((1, length)) < 0.5
    return at(np.flatnonzero((random.random((12, length)) < 0.9) & full), (12, length))


ROLES = {
    **{f"plane {plane} of {kind}": (role + plane, floats(kind)) for kind, role, plane in (
        ("fp32", 8, 0), ("fp32", 8, 3), ("bf16", 12, 0), ("bf16", 12, 1), ("fp16", 14, 0), ("fp16", 14, 1),
    )},
    "int8 codes": (16, integers(8)),
    "int4 codes": (17, integers(4)),
    "signs": (26, integers(1)),
    "scales of int8": (18, scales(8)),
    "scales of int4": (22, scales(4)),
    "scales of signs": (27, scales(1)),
    "gaps": (FIRST_GAPS, gaps),
    "extra bits": (EXTRA, extra),
    "bitmaps": (BITMAPS, bitmap),
    "row classes": (CLASSES, rows),
    "column classes": (CLASSES, columns),
}  # fmt: skip


def check_arrives(role, build, length, seed):
    message = Message(HEADER, {"m/A": build(length, np.random.default_rng(seed))})
    payload = encode(message)
    assert {stream.role: stream.size for stream in open_payload(payload).streams}[role] == length
    read = decode(payload)
    assert equal(read, message)
    assert encode(read) == payload


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ROLES)
def test_a_stream_of_about_one_chunk(name, step):
    check_arrives(*ROLES[name], CHUNK + step, seed=1)


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(ROLES)),
    st.integers(0, 4),
    st.sampled_from(STEPS) | st.integers(3, CHUNK - 2),
    st.integers(0, 2**32),
)
def test_a_stream_of_any_length(name, chunks, step, seed):
    # Each byte of extra bits stands for some 2,075 elements, and default limits end at 2³⁰ of those.
    most = CHUNK * 3 if name == "extra bits" else CHUNK * 5
    check_arrives(*ROLES[name], min(max(chunks * CHUNK + step, 64), most), seed)


@pytest.mark.parametrize("step", STEPS)
def test_a_stream_of_zeros(step):
    """Chunks that pack to a few bytes, and a last one that stays as it is."""
    for length in (CHUNK + step, 3 * CHUNK + step):
        message = Message(HEADER, {"m/A": Dense((length,), torch.zeros(length))})
        payload = encode(message)
        assert len(payload) < 1000
        assert equal(decode(payload), message)
