"""Payloads that wait on disk: read as they were written, with nothing left of them."""

from __future__ import annotations

import pytest

from fedloom import filed
from fedloom.filed import SMALL
from fedloom.server.spool import Spool


def test_a_large_payload_lies_in_a_file_without_a_name(tmp_path):
    held: Spool[str] = Spool(tmp_path)
    large, small = bytes(range(256)) * (SMALL // 256), b"few"
    held["bank"], held["depot"] = large, small
    assert dict(held) == {"bank": large, "depot": small} and len(held) == 2
    assert not isinstance(held._held["bank"], bytes), "ten sites' updates took ten adapters of memory"
    held["bank"] = large[::-1]
    assert held["bank"] == large[::-1] == held["bank"] and not list(tmp_path.iterdir())
    held.clear()
    assert held.get("bank") is None and not held


def test_on_a_disk_without_room_a_payload_stays_in_memory(tmp_path, monkeypatch):
    def full(file, piece, at):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(filed, "_write_at", full)
    held: Spool[int] = Spool(tmp_path)
    held[3] = bytes(SMALL)
    assert held[3] == bytes(SMALL) and list(held) == [3]
    with pytest.raises(KeyError):
        held[4]


def test_nothing_is_read_to_know_what_is_there_or_to_let_go_of_it(tmp_path, monkeypatch):
    held: Spool[int] = Spool(tmp_path)
    held[1] = held[2] = bytes(SMALL)
    monkeypatch.setattr(Spool, "__getitem__", None)
    held[1] = bytes(SMALL)
    assert 1 in held and 3 not in held
    held.clear()
    assert not held
