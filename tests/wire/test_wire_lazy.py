"""Dense floats decoded tensor by tensor: the bits of `decode`, in any order, with every fault of a stream found."""

from __future__ import annotations

import random

import pytest
import torch

from fedloom.errors import WireError
from fedloom.wire import LazyEntries, Limits, Message, decode, decode_lazily, encode
from fedloom.wire.streams import CHUNK
from wire_samples import HEADER, dense, equal, equal_entries, samples

MESSAGE = Message(
    HEADER,
    {
        "a/A": dense((7, 3), "fp32", 1),
        "a/B": dense((0, 5), "fp32", 2),
        "b/A": dense((211, 331), "fp32", 3),  # over several chunks of each plane, and ending inside one
        "b/B": dense((CHUNK // 64, 64), "bf16", 4),
        "c/A": dense((), "fp16", 5),
        "c/B": dense((150_001,), "fp32", 6),
    },
)


def test_every_order_gives_what_decode_gives():
    payload = encode(MESSAGE)
    whole, lazy = decode(payload), decode_lazily(payload)
    assert isinstance(lazy.entries, LazyEntries) and list(lazy.entries) == list(whole.entries)
    assert equal(lazy, whole) and equal(whole, MESSAGE)
    names = 3 * list(whole.entries)
    random.Random(1).shuffle(names)
    assert all(equal_entries(lazy.entries[name], whole.entries[name]) for name in names)
    some = lazy.entries.subset({"b/A", "c/B", "none"})
    assert list(some) == ["b/A", "c/B"] and "a/A" not in some and equal_entries(some["c/B"], whole.entries["c/B"])


def test_in_order_of_name_every_chunk_is_unpacked_once(monkeypatch):
    from fedloom.wire import streams

    payload = encode(MESSAGE)
    lazy, plain, unpacked = decode_lazily(payload), streams.unpack, []
    monkeypatch.setattr(streams, "unpack", lambda coded, *rest: unpacked.append(coded) or plain(coded, *rest))
    assert sum(entry.values.numel() for entry in lazy.entries.values()) > 2 * CHUNK
    once, chunks = len(unpacked), sum(-(-values // CHUNK) for values in (150_001 + 211 * 331 + 21,) * 4)
    assert once == chunks + 2 * 1 + 2  # and two planes of bf16 and of fp16, a chunk each


@pytest.mark.parametrize("name", sorted(samples()))
def test_other_messages_are_decoded_whole(name: str):
    message = samples()[name]
    lazy = decode_lazily(encode(message))
    assert equal(lazy, message)
    assert isinstance(lazy.entries, LazyEntries) == (name in ("nothing", "fp32-dense"))


def test_a_fault_is_found_as_decode_finds_it():
    payload = bytearray(encode(MESSAGE))
    payload[len(payload) // 2] ^= 1
    with pytest.raises(WireError, match="checksum"):
        decode_lazily(bytes(payload))
    with pytest.raises(WireError, match="elements: at most 9 are allowed"):
        decode_lazily(encode(MESSAGE), Limits(max_values=9))


def test_a_stream_of_another_length_is_refused_at_once(monkeypatch):
    from fedloom.wire import codec

    plain = codec._put_values

    def longer(entries):
        sinks = plain(entries)
        sinks[8].add(torch.zeros(5, dtype=torch.uint8).numpy())
        return sinks

    monkeypatch.setattr(codec, "_put_values", longer)
    payload = encode(MESSAGE)
    for read in (decode, decode_lazily):
        with pytest.raises(WireError, match="stream 8 has"):
            read(payload)
