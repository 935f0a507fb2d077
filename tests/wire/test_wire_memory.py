"""What encoding and moving a payload takes in memory beside the payload: numbers of bytes, not of seconds."""

from __future__ import annotations

import socket
import tracemalloc
from collections.abc import Callable
from threading import Thread

import torch

from fedloom.compress.entries import Dense
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import State
from fedloom.site.protocol import Parcel, receive_parcel, send_parcel
from fedloom.site.store import Store, TurnRecord
from fedloom.wire import Header, Message, encode
from fedloom.workspace import checkpoint
from fedloom.workspace.keys import PayloadKeys


def peak_of(call: Callable[[], bytes]) -> float:
    """The most memory that was taken, over the size of what came of it."""
    tracemalloc.start()
    try:
        made = call()
        return tracemalloc.get_traced_memory()[1] / len(made)
    finally:
        tracemalloc.stop()


def test_encoding_takes_little_more_than_the_payload():
    """Planes of all values, their chunks and the pieces of the payload lay beside it: 3.4 times as much."""
    draw = torch.Generator().manual_seed(0)
    entries = {f"m{k}/A": Dense((2048, 1024), torch.randn(2**21, generator=draw)) for k in range(5)}
    message = Message(Header("update", "fedit", 1, 0, "a" * 32, "b" * 32, 3), entries)
    assert peak_of(lambda: encode(message)) < 1.6


def test_a_parcel_is_received_once():
    """The bytes that had come were copied when all were there."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = Thread(target=send_parcel, args=(theirs, Parcel({}, (bytes(2**24),))))
        sender.start()
        assert peak_of(lambda: receive_parcel(ours).payloads[0]) < 1.3
        sender.join()


def test_a_record_is_written_from_where_its_tensors_lie(tmp_path):
    """A copy of all states and payloads was made first. What is read back leaves the payload where it is."""
    shelves = checkpoint._Shelves(PayloadKeys())
    wide = torch.randn(4, 6)
    state = State(
        LoraState({"q": LoraPair(wide[:2], torch.randn(5, 2))}), memory={"rest": wide, "t": wide.T}, digest="d"
    )
    shelves.party(state)
    held = {tensor.data_ptr() for tensor in shelves.tensors.values()}
    assert wide.data_ptr() in held and len(held) == 3, "the transposed one alone is a copy; the rows lie in the whole"
    store = Store(tmp_path / "job", "seal")
    store.save(TurnRecord(1, state, state, b"facts", b"payload" * 1000))
    store.close()
    again = Store(tmp_path / "job", "seal")
    record = again.load()
    assert record is not None and (record.payload, record.payload_bytes, record.facts) == (b"", 7000, b"facts")
    assert again.read_payload() == b"payload" * 1000
    for name, tensor in state.adapter.tensors().items():
        assert torch.equal(record.after.adapter.tensors()[name], tensor)
    assert torch.equal(record.after.memory["t"], wide.T)
    again.close()
