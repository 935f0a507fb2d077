"""Encode and decode are inverse, the bytes are fixed, and the reader in the documentation reads them too."""

import math
import re
import subprocess
import sys
import tracemalloc
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.entries import Dense, Quantized, Seeded, Sparse, floats
from fedloom.compress.quantize import VALUE_KINDS, quantize
from fedloom.errors import WireError
from fedloom.wire import Header, Message, decode, describe, encode, read_header
from fedloom.wire.gaps import BitSink, BitSource, from_symbols, to_symbols
from fedloom.wire.streams import Sink
from fedloom.wire.values import put_words
from wire_samples import HEADER, dense, equal, numbers, samples, seeded, sparse, structured

HERE = Path(__file__).parents[1]
SAMPLES = samples()
GOLDEN = HERE / "golden" / "wire-v2"


@pytest.mark.parametrize("name", SAMPLES)
def test_golden_bytes(name):
    payload = bytes.fromhex((GOLDEN / f"{name}.hex").read_text())
    assert equal(decode(payload), SAMPLES[name])
    if zstandard.ZSTD_VERSION == (1, 5, 7):  # another release may pack the same content in other bytes
        assert encode(SAMPLES[name]) == payload


def test_there_is_a_golden_file_for_every_sample():
    assert {path.stem for path in GOLDEN.glob("*.hex")} == set(SAMPLES)


def positions_of(shape):
    size = math.prod(shape)
    return st.one_of(
        st.sets(st.integers(0, max(size - 1, 0)), max_size=min(size, 60)).map(sorted),
        st.integers(1, 9).map(lambda step: list(range(0, size, step))),
    )


@st.composite
def entries(draw):
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
    size = math.prod(shape)
    kind = draw(st.sampled_from(sorted(VALUE_KINDS)))
    seed = draw(st.integers(0, 2**63))
    form = draw(st.sampled_from(["dense", "sparse", "seeded"]))
    if form == "seeded":
        return seeded(shape if len(shape) == 2 else (1, size), draw(st.integers(0, 65536)) / 65536, kind, seed)
    if form == "sparse":
        where = (
            torch.tensor(draw(positions_of(shape)), dtype=torch.int64) if size else torch.empty(0, dtype=torch.int64)
        )
        return Sparse(shape, where, quantize(kind)(numbers(where.numel(), seed), seed))
    return Dense(shape, quantize(kind)(numbers(size, seed), seed))


@settings(max_examples=150)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), entries(), max_size=5))
def test_round_trip(own):
    message = Message(HEADER, own)
    payload = encode(message)
    assert equal(decode(payload), message)
    assert read_header(payload) == HEADER
    assert encode(Message(HEADER, dict(reversed(own.items())))) == payload
    assert sum(describe(payload).parts.values()) == len(payload)


@pytest.mark.parametrize("density", [0.0, 0.0002, 0.004, 0.05, 0.2, 0.3, 0.7, 1.0])
def test_positions_of_any_density(density):
    steps = round(density * 65536) / 65536
    for shape in ((3, 50001), (997, 64), (64, 1009)):
        message = Message(HEADER, {"m/A": sparse(shape, steps, "int8", 5)})
        payload = encode(message)
        assert equal(decode(payload), message)
        entropy = shape[0] * shape[1] * binary_entropy(steps) / 8
        assert describe(payload).parts["positions"] <= 1.05 * entropy + 100


def binary_entropy(share):
    return 0.0 if share in (0.0, 1.0) else -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def test_even_positions_cost_their_entropy_and_structured_ones_less():
    even = Message(HEADER, {f"{number}/A": sparse((64, 3072), 3277 / 65536, "int4", number) for number in range(10)})
    uneven = Message(HEADER, {f"{number}/A": structured((64, 3072), "int4", number) for number in range(10)})
    for message, least, most in ((even, 0.99, 1.01), (uneven, 0.3, 0.75)):
        sent = sum(entry.values.numel() for entry in message.entries.values())
        size = sum(math.prod(entry.shape) for entry in message.entries.values())
        entropy = size * binary_entropy(sent / size) / 8
        assert least * entropy < describe(encode(message)).parts["positions"] < most * entropy
    layouts = {tensor.positions for tensor in describe(encode(uneven)).tensors}
    assert all("classes" in layout for layout in layouts)


def test_large_messages_and_streams_of_many_chunks():
    """More than 128 KiB a stream and 64 Ki positions a cell, with threads; the same bytes without them."""
    own = {
        "a/A": sparse((700, 3001), 0.0625, "fp32", 1),
        "b/A": structured((900, 1201), "bf16", 2),
        "c/A": sparse((700, 1000), 0.5, "int8", 3),
        "d/A": dense((400, 401), "int4", 4),
    }
    message = Message(HEADER, own)
    payload = encode(message)
    assert equal(decode(payload), message)
    script = "import sys; from fedloom.wire import codec, decode, encode\n"
    script += "codec.run_side_by_side = lambda left, right, size: (left(), right())\n"
    script += "payload = sys.stdin.buffer.read(); sys.stdout.buffer.write(encode(decode(payload)))"
    alone = subprocess.run([sys.executable, "-c", script], input=payload, capture_output=True, check=True)
    assert alone.stdout == payload


def test_decoding_needs_little_more_than_its_output():
    own = {f"{number:03d}/A": sparse((64, 3072), 0.0625, "int4", number) for number in range(60)}
    payload = encode(Message(HEADER, own))
    decode(payload)
    tracemalloc.start()
    try:
        kept = decode(payload)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    output = sum(
        8 * e.positions.numel() + e.values.codes.numel() + 4 * e.values.scales.numel() for e in kept.entries.values()
    )
    assert peak <= output + 1.2 * len(payload) + 2**20  # a few chunks of 128 KiB, whatever the size


def test_the_reader_in_the_documentation_reads_every_sample():
    text = (HERE.parent / "docs" / "wire-format.md").read_text()
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)
    for message in SAMPLES.values():
        tensors = scope["read"](encode(message))
        assert list(tensors) == sorted(message.entries)
        for name, (shape, values, where) in tensors.items():
            entry = message.entries[name]
            assert shape == entry.shape
            torch.testing.assert_close(
                torch.tensor(values, dtype=torch.float32).reshape(-1),
                floats(entry.values),
                rtol=0,
                atol=0,
                equal_nan=True,
            )
            if isinstance(entry, Sparse):
                assert where == entry.positions.tolist()


def test_an_index_of_many_modules_is_small():
    own = {
        f"model.layers.{layer}.self_attn.{kind}/B": seeded((64, 8), 0.25, "bf16", layer)
        for layer in range(7)
        for kind in "qkvo"
    }
    parts = describe(encode(Message(HEADER, own))).parts
    assert parts["index"] - 8 * len(own) < 300  # 8 bytes of seed a tensor
    assert parts["header"] < 60


def test_planes_do_not_depend_on_the_byte_order_of_the_machine():
    """Words held in the other byte order give the same streams."""
    words = np.array([0x80000001, 0x3F800000, 0x00000000, 0xDEADBEEF], dtype=np.uint32)
    taken = []
    for held in (words.astype("<u4"), words.astype(">u4")):
        sinks = defaultdict(Sink)
        put_words(held, 8, sinks)
        taken.append([bytes(sinks[8 + plane].chunk(0)) for plane in range(4)])
    assert taken[0] == taken[1]
    # 0x80000001 rotated left by one is 0x00000003; planes go from the most significant byte to the least.
    assert [plane[0] for plane in taken[0]] == [0, 0, 0, 3]
    assert [plane[3] for plane in taken[0]] == [0xBD, 0x5B, 0x7D, 0xDF]


def _coded(gaps):
    """The symbols of gaps and their extra bits from positions in two cells, by the compiled loop."""
    pytest.importorskip("numba")
    from fedloom.wire import compiled

    half = len(gaps) // 2
    cells = [np.cumsum(np.array(part, dtype=np.int64) + 1) - 1 for part in (gaps[:half], gaps[half:])]
    sink = BitSink()
    symbols = [sink.code(cell, np.array([cell.size]), compiled) for cell in cells]
    return np.concatenate(symbols), sink.to_bytes()


@given(st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 40), max_size=200))
def test_gap_symbols_are_those_of_the_definition(gaps):
    symbols, numbers_, widths = to_symbols(np.array(gaps, dtype=np.int64))
    sink = BitSink()
    third = len(numbers_) // 3
    sink.add(numbers_[:third], widths[:third])
    sink.add(numbers_[third : 2 * third], widths[third : 2 * third])
    sink.add(numbers_[2 * third :], widths[2 * third :])
    bits = 0
    at = 0
    for gap, symbol in zip(gaps, symbols.tolist(), strict=True):
        width = max(gap.bit_length() - 4, 0)
        assert symbol == (gap if gap < 16 else 8 * width + (gap >> width))
        bits |= (gap & (2**width - 1)) << at if gap >= 16 else 0
        at += width if gap >= 16 else 0
    assert int.from_bytes(sink.to_bytes().tobytes(), "little") == bits
    assert all(map(np.array_equal, _coded(gaps), (symbols, sink.to_bytes())))
    source = BitSource(sink.to_bytes())
    assert from_symbols(symbols, source).tolist() == gaps
    source.end()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Sparse((2, 3), torch.tensor([3, 1]), torch.ones(2)), "increase strictly"),
        (Sparse((2, 3), torch.tensor([1, 1]), torch.ones(2)), "increase strictly"),
        (Sparse((2, 3), torch.tensor([-1, 1]), torch.ones(2)), "increase strictly"),
        (Sparse((2, 3), torch.tensor([1, 6]), torch.ones(2)), "below 6"),
        (Sparse((2, 3), torch.tensor([1, 2], dtype=torch.int32), torch.ones(2)), "int64"),
        (Dense((2,), torch.ones(2, dtype=torch.float64)), "cannot travel"),
        (Dense((2**16, 2**15, 0), torch.ones(0)), "fewer than 2\\^31"),
        (Dense((1,) * 9, torch.ones(1)), "at most 8"),
        (Dense((2,), Quantized(torch.tensor([8, 0], dtype=torch.int8), torch.ones(1), 2, 4)), "outside -7 to 7"),
        (Dense((2,), Quantized(torch.tensor([-8, 0], dtype=torch.int8), torch.ones(1), 2, 4)), "outside -7 to 7"),
        (Dense((2,), Quantized(torch.zeros(2, dtype=torch.int8), torch.ones(2), 2, 8)), "expected 1"),
        (Dense((2,), Quantized(torch.zeros(2, dtype=torch.int8), -torch.ones(1), 2, 8)), "scale"),
        (Dense((2,), Quantized(torch.zeros(2, dtype=torch.int8), torch.ones(1), 0, 8)), "blocks"),
        (Seeded((4,), 3, 0.3, torch.ones(1)), "multiple of 1/65536"),
        (Seeded((4,), 2**64, 0.5, torch.ones(1)), "seed below"),
    ],
)
def test_a_sender_is_told_what_cannot_travel(entry, reason):
    with pytest.raises(WireError, match="'layer/A'.*" + reason):
        encode(Message(HEADER, {"layer/A": entry}))


@pytest.mark.parametrize(
    "header",
    [
        Header("reply", "fedit", 1, 0, ""),  # type: ignore[arg-type]
        Header("update", "fedit", -1, 0, ""),
        Header("update", "fedit", 2**63, 0, ""),
        Header("update", "fedit", 1, 0, "abc"),
        Header("update", "m" * 256, 1, 0, ""),
    ],
)
def test_headers_that_cannot_travel(header):
    with pytest.raises(WireError, match="cannot be sent"):
        encode(Message(header, {}))


def test_a_name_longer_than_allowed_is_refused():
    with pytest.raises(WireError, match="1025 bytes"):
        encode(Message(HEADER, {"x" * 1025: dense((1,), "fp32", 1)}))


def test_tensors_of_a_strided_view_or_with_a_gradient_travel():
    base = torch.arange(12.0, requires_grad=True).view(3, 4)
    column = base[:, 1]
    sent = Message(HEADER, {"m/A": Dense((3,), column)})
    assert decode(encode(sent)).entries["m/A"].values.tolist() == [1.0, 5.0, 9.0]
