"""What `encode` accepts every reader with the same limits reads; all else the sender is told."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.entries import Dense, Quantized, Seeded, Sparse
from fedloom.compress.masks import seeded_count
from fedloom.compress.quantize import quantize
from fedloom.errors import ShapeError, WireError
from fedloom.wire import DEFAULT, Header, Limits, Message, decode, encode
from fedloom.wire.limits import FREE_DRAWN, FREE_INDEX, FREE_TENSORS
from wire_samples import HEADER, equal, seeded, sparse

NONE = torch.empty(0)
NOWHERE = torch.empty(0, dtype=torch.int64)


def check_agreement(entries, limits=DEFAULT):
    message = Message(HEADER, entries)
    payload = encode(message, limits)
    read = decode(payload, limits)
    assert equal(read, message)
    assert encode(read, limits) == payload
    return payload


@pytest.mark.parametrize("number", [FREE_TENSORS - 1, FREE_TENSORS, FREE_TENSORS + 1, 9000])
def test_any_number_of_empty_tensors_arrives(number):
    """9,000 of them packed to 264 bytes, which no reader took."""
    payload = check_agreement({f"{at:05d}/A": Dense((0,), NONE) for at in range(number)})
    assert (len(payload) > 1000) == (number > FREE_TENSORS)


def test_a_large_index_arrives():
    """A mixture of experts, an element a tensor: 761 kB of index, which no reader took."""
    layers, experts = range(24), range(64)
    names = (
        f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}/{factor}"
        for layer, expert, part, factor in itertools.product(layers, experts, ("w1", "w2", "w3"), "AB")
    )
    where = torch.tensor([7])
    entries = {name: Sparse((8, 2048), where, torch.ones(1)) for name in names}
    long = {f"{'x' * 60}{at * 7919 % 1000003:07d}{'y' * 60}/A": Dense((1,), torch.ones(1)) for at in range(5000)}
    check_agreement(entries)
    check_agreement(long)


@pytest.mark.parametrize("share", [0, 1 / 65536, 1 / 64, 1])
def test_masks_of_many_elements_arrive_or_the_sender_is_told(share):
    """All zeros pack to next to nothing, and a reader draws masks only for payloads of some size."""
    numel = 2 * FREE_DRAWN
    kept = seeded_count(numel, share, 5)
    zeros = quantize("sign")(torch.zeros(kept), 0)
    if share == 1 / 65536:
        with pytest.raises(WireError, match="33,554,432 elements under seeded masks.*sparse tensors instead"):
            encode(Message(HEADER, {"m/A": Seeded((numel,), 5, share, zeros)}))
    else:
        check_agreement({"m/A": Seeded((numel,), 5, share, zeros)})


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(max_tensors=3), "4 tensors: at most 3"),
        (Limits(max_values=399), "400 elements: at most 399"),
        (Limits(max_bytes=99), "bytes when decoded: at most 99"),
        (Limits(max_index=20), "bytes of index: at most 20"),
        (Limits(max_payload=100), "bytes of payload: at most 100"),
        (Limits(max_drawn=99), "100 elements under seeded masks: at most 99"),
    ],
)
def test_the_sender_is_told_what_a_reader_would_refuse(limits, reason):
    message = Message(HEADER, {**{f"{at}/A": sparse((10, 10), 0.5, "fp32", at) for at in range(3)}})
    message = Message(HEADER, {**message.entries, "3/A": seeded((10, 10), 0.5, "fp32", 3)})
    with pytest.raises(WireError, match=f"cannot be sent.*{reason}.*Send fewer modules"):
        encode(message, limits)
    with pytest.raises(WireError):
        decode(encode(message), limits)


def test_limits_of_a_payload_grow_with_it_and_end():
    small, large = Limits().of_payload(100), Limits().of_payload(2**31)
    assert (small.max_tensors, small.max_index) == (FREE_TENSORS, FREE_INDEX)
    assert FREE_DRAWN < small.max_drawn < 2 * FREE_DRAWN
    assert large == Limits()
    assert Limits(max_tensors=5, max_index=6, max_drawn=7).of_payload(2**31) == Limits(
        max_tensors=5, max_index=6, max_drawn=7
    )


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Seeded((4,), 3, 0.5, torch.ones(4)), "has 4 values, and its mask keeps 2"),
        (Dense((2,), Quantized(torch.tensor([0, 1], dtype=torch.int8), torch.ones(1), 2, 1)), "neither -1 nor 1"),
        (Dense((2,), Quantized(torch.tensor([-128, 1], dtype=torch.int8), torch.ones(1), 2, 1)), "neither -1 nor 1"),
        (Dense((2,), Quantized(torch.tensor([-128, 1], dtype=torch.int8), torch.ones(1), 2, 4)), "outside -7 to 7"),
    ],
)
def test_what_would_arrive_as_something_else_is_refused(entry, reason):
    with pytest.raises(WireError, match=f"'layer/A'.*{reason}"):
        encode(Message(HEADER, {"layer/A": entry}))


def test_names_that_are_no_text_are_refused():
    with pytest.raises(WireError, match="cannot be sent"):
        encode(Message(HEADER, {"\ud800/A": Dense((1,), torch.ones(1))}))
    with pytest.raises(WireError, match="method's name"):
        encode(Message(Header("update", "\ud800", 1, 0, ""), {}))


@st.composite
def any_entries(draw):
    """Entries of every form, many of them such as no sender should make."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=9)))
    numel = torch.Size(shape).numel()
    kept = draw(st.sampled_from([0, 1, numel // 2, numel, numel + 1]))
    bits = draw(st.sampled_from([None, 8, 4, 1]))
    values = torch.tensor(draw(st.lists(st.floats(width=32), min_size=min(kept, 4), max_size=min(kept, 4))) or [0.0])
    values = values.repeat(kept // values.numel() + 1)[:kept]
    if bits:
        block = draw(st.sampled_from([0, 1, 3, 65536, 65537]))
        codes = torch.arange(kept).remainder(draw(st.integers(1, 20))).to(torch.int8) - draw(st.integers(0, 9))
        scales = torch.full((-(-kept // max(block, 1)),), draw(st.floats(width=32)))
        values = Quantized(codes, scales, block, bits)
    form = draw(st.sampled_from(["dense", "sparse", "seeded"]))
    if form == "seeded":
        return Seeded(shape, draw(st.integers(-1, 2**64)), draw(st.sampled_from([0.0, 0.5, 1.0, 0.3, 2.0])), values)
    if form == "sparse":
        start, step = draw(st.integers(-1, 2)), draw(st.integers(0, 3))
        return Sparse(shape, start + step * torch.arange(kept), values)
    return Dense(shape, values)


@settings(max_examples=200)
@given(st.data(), st.integers(-1, 2**63), st.text(max_size=3))
def test_every_message_arrives_or_is_refused(data, number, method):
    try:
        entries = data.draw(st.dictionaries(st.text(max_size=4), any_entries(), max_size=3))
    except ShapeError:  # told when the entry is built
        return
    message = Message(Header("update", method, number, 0, "", num_examples=1), entries)
    try:
        payload = encode(message)
    except WireError:
        return
    read = decode(payload)
    assert equal(read, message)
    assert encode(read) == payload


def test_many_empty_tensors_make_a_payload_that_a_reader_takes(monkeypatch):
    """Their index packs to next to nothing; a reader wants four bytes of payload for each."""
    monkeypatch.setattr("fedloom.wire.limits.FREE_TENSORS", 16)
    nothing = {f"{at:05d}/A": Sparse((4, 8), NOWHERE, NONE) for at in range(400)}
    payload = encode(Message(HEADER, nothing))
    assert 4 * len(nothing) <= len(payload) < 60 * len(nothing)
    assert len(check_agreement(nothing)) == len(payload)
