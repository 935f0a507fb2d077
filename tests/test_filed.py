"""Payloads in files: the same bytes as in memory, with nothing left of the file, and on a full disk too."""

from __future__ import annotations

import gc
import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedloom.filed as filed
from fedloom.compress.entries import Dense
from fedloom.filed import SMALL, Sheet, in_memory, lay_down, let_go, let_go_of_all, slices
from fedloom.wire import Header, Message, decode, decode_lazily, describe, encode
from wire_samples import equal

LARGE = bytes(range(256)) * (SMALL // 256 + 700)


def seal(pieces) -> bytes:
    hasher = hashlib.md5()
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()


@given(pieces=st.lists(st.binary(max_size=300_000), max_size=4), head=st.binary(max_size=40), gap=st.integers(0, 40))
def test_a_sheet_in_a_file_is_the_one_in_memory(tmp_path_factory, pieces, head, gap):
    folder = tmp_path_factory.mktemp("sheets")
    made = []
    for place in (folder, None):
        sheet = Sheet(place, SMALL, gap=gap, reserve=place is None)
        assert sheet.is_in_memory == (place is None)
        assert [sheet.write(piece) for piece in pieces] == list(map(len, pieces))
        made.append(sheet.closed(head, seal))
    body = head + b"".join(pieces)
    assert made[0] == made[1] == body + seal([body])
    assert isinstance(made[1], bytes) and in_memory(made[0]) == made[1] and not list(folder.iterdir())


@pytest.mark.parametrize("room", [0, 3 * 2**18])
def test_on_a_full_disk_what_was_written_goes_on_in_memory(tmp_path, monkeypatch, room):
    def write(descriptor: int, piece: bytes, at: int) -> int:
        if at + len(piece) > room:
            raise OSError(28, "no space left on device")
        return pwrite(descriptor, piece, at)

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", write)
    sheet = Sheet(tmp_path, len(LARGE))
    for start in range(0, len(LARGE), 2**18):
        sheet.write(LARGE[start : start + 2**18])
    assert sheet.is_in_memory and sheet.closed() == LARGE
    assert lay_down(LARGE, tmp_path) is LARGE and not list(tmp_path.iterdir())


def test_a_large_payload_is_laid_down_once_and_looked_at_again_and_again(tmp_path):
    laid = lay_down(LARGE, tmp_path)
    assert isinstance(laid, memoryview) and laid.readonly and lay_down(laid, tmp_path) is laid
    assert lay_down(b"few", tmp_path) == b"few" and isinstance(lay_down(LARGE, None), bytes)
    for forget in (lambda: let_go(laid), let_go_of_all):
        assert laid == LARGE
        forget()
    assert b"".join(slices(laid)) == LARGE == b"".join(slices(LARGE)) and len(list(slices(laid))) > len(
        list(slices(LARGE))
    )
    assert hashlib.sha256(laid).digest() == hashlib.sha256(LARGE).digest()


def test_what_was_looked_at_of_a_payload_in_a_file_does_not_count_to_the_process(tmp_path):
    def resident() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    if filed._DROP is None or not Path("/proc/self/status").exists():
        pytest.skip("this system does not say what it counts")
    laid = lay_down(bytes(2**24), tmp_path)
    before = resident()
    assert laid == bytes(2**24) and resident() - before >= 2**23
    let_go(laid)
    assert resident() - before < 2**22
    assert sum(map(len, slices(laid))) == 2**24 and resident() - before < 2**22


def test_an_encoded_message_has_the_same_bytes_in_a_file(tmp_path):
    draw = torch.Generator().manual_seed(0)
    entries = {
        f"m{k}/{part}": Dense((300, 701), torch.randn(300 * 701, generator=draw)) for k in range(2) for part in "AB"
    }
    message = Message(Header("update", "fedit", 1, 0, "a" * 32, "b" * 32, 3), entries)
    payload, laid = encode(message), encode(message, folder=tmp_path)
    assert isinstance(payload, bytes) and isinstance(laid, memoryview) and laid == payload
    assert equal(decode(laid), message) and describe(laid) == describe(payload)
    lazy = decode_lazily(laid).entries
    assert all(torch.equal(lazy[name].values, entry.values) for name, entry in entries.items())
    assert not list(tmp_path.iterdir())


def test_a_payload_that_is_given_up_leaves_no_open_file(tmp_path, recwarn):
    sheet = Sheet(tmp_path, SMALL)
    sheet.write(b"some of it")
    opened = sheet._file
    assert opened is not None and not opened.closed
    del sheet
    gc.collect()
    assert opened.closed and not recwarn.list
