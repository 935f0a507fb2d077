"""The worker's socket: the token is asked first, sizes and times are bounded, and no request ends the worker."""

import json
import logging
import os
import socket
import struct
import threading
from contextlib import contextmanager, suppress

import pytest

from fedloom.deploy import doctor
from fedloom.errors import SiteError
from fedloom.site import door as doors
from fedloom.site import protocol, worker
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.door import Door
from fedloom.site.log_lines import OneLine
from fedloom.site.protocol import GREETING, MAGIC, WRONG_TOKEN, Parcel, exchange, greeting, receive_parcel, send_parcel

TOKEN = "5" * 64


class Panic(BaseException):
    """What a library in Rust raises."""


class Echo(Desk):
    """Says what it was asked; `fail` raises, as no desk should."""

    def answer(self, parcel):
        if parcel.facts.get("ask") == "fail":
            raise Panic("out of bounds")
        if parcel.facts.get("ask") == "bug":
            raise RuntimeError("a bug")
        return Parcel({"asked": str(parcel.facts.get("ask"))}, parcel.payloads)


def site(folder, **more):
    settings = {"model": "m", "data": "d", "state": str(folder / "state"), "max_bytes_request": "64KB"} | more
    return SiteConfig(name="bank", socket=str(folder / "s"), token_file=str(folder / "t"), **settings)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A worker's loop in a thread that a failing request would end; yields its socket.

    Deadlines are far away, whatever else the machine does; tests of deadlines set their own.
    """
    monkeypatch.setattr(doors, "GREETING_SECONDS", 600.0)
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 600.0)
    asked = site(tmp_path)
    ended = threading.Event()
    with worker._listening(tmp_path / "s") as listener:
        door = Door(listener, TOKEN)

        def loop():
            while not ended.is_set():
                connection = door.next_caller(0.02)
                if connection is not None:
                    with connection:
                        worker._serve_one(connection, Echo(asked))

        thread = threading.Thread(target=loop)
        thread.start()
        yield tmp_path / "s"
        ended.set()
        thread.join()
        door.close()


@contextmanager
def caller(path):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        yield connection


def asked(path, ask="hello", *payloads, token=TOKEN):
    with caller(path) as connection:
        return exchange(connection, token, Parcel({"ask": ask}, payloads))


def head(text, length=None):
    return MAGIC + struct.pack(">I", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "sent",
    [
        head(json.dumps({"facts": {"token": "\ud800"}, "sizes": []}).encode()),
        greeting("\ud800") + head(b'{"facts":{},"sizes":[]}'),
        GREETING + b"\xff" * 32,
        greeting(TOKEN) + head(json.dumps({"facts": {"ask": "\ud800"}, "sizes": []}).encode()),
        greeting(TOKEN) + head(b"[" * 200_000),
        greeting(TOKEN) + head(b'{"facts":{},"sizes":[1e400]}'),
        greeting(TOKEN) + head(b"\xff\xfe"),
        greeting(TOKEN) + head(b'{"facts":{"a":' + b"9" * 10_000 + b'},"sizes":[]}'),
        greeting(TOKEN) + head(b'{"facts":{"ask":"fail"},"sizes":[]}'),
        greeting(TOKEN) + head(b'{"facts":{"ask":"bug"},"sizes":[]}'),
    ],
)
def test_the_worker_outlives_every_request(path, sent):
    with caller(path) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert set(receive_parcel(connection).facts) & {"error", "asked"}
    assert asked(path).facts == {"asked": "hello"}


def test_the_doctor_tells_a_worker_that_takes_the_token_from_one_that_does_not(path, tmp_path):
    (tmp_path / "right").write_text(TOKEN + "\n")
    (tmp_path / "wrong").write_text("6" * 64)
    assert doctor.check_worker(path, str(tmp_path / "right")).outcome == "ok"
    refused = doctor.check_worker(path, str(tmp_path / "wrong"))
    assert refused.outcome == "fail" and "refuses the token" in refused.found


def test_the_error_of_a_panic_tells_its_kind_alone(path):
    assert asked(path, "fail").facts["error"] == "the site could not take its turn: Panic"


def test_without_the_token_nothing_but_the_greeting_is_read(path, monkeypatch):
    """A head and payloads follow a wrong greeting; neither is taken in, and the caller learns why."""
    taken = []
    monkeypatch.setattr(protocol, "_take", lambda *arguments: taken.append(arguments))
    with caller(path) as connection:
        connection.sendall(greeting("wrong") + head(b"{}"))
        said = connection.recv(4096)
    assert WRONG_TOKEN.encode() in said and not taken


def test_a_caller_hears_why_even_while_it_still_sends(path):
    large = os.urandom(4_000_000)  # more than a socket holds
    assert asked(path, "hello", large, token="wrong").facts["error"] == WRONG_TOKEN
    assert "at most 64,000 are taken" in asked(path, "hello", large).facts["error"]
    assert asked(path, "hello", large[:64_000]).payloads == (large[:64_000],)


def test_a_request_may_bring_less_than_a_parcel_of_the_protocol(tmp_path):
    settings = SiteConfig(name="bank", model="m", data="d")
    assert worker.parse_bytes(settings.max_bytes_request) == 2**30 < protocol.MOST_BYTES
    near, far = socket.socketpair()
    with near, far:
        send_parcel(near, Parcel({}, (b"x" * 11,)))
        with pytest.raises(SiteError, match="11 bytes; at most 10"):
            receive_parcel(far, 10)


def test_callers_without_the_token_keep_nobody_waiting(path):
    """More silent callers than the door listens to, each of whom began a greeting, and one honest one."""
    silent = []
    try:
        for _ in range(doors.MOST_STRANGERS + 40):
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(30)
            connection.connect(str(path))
            silent.append(connection)
            with suppress(ConnectionError):  # it may have had to give way already
                connection.sendall(GREETING)
        assert asked(path).facts == {"asked": "hello"}
    finally:
        for connection in silent:
            connection.close()


def test_a_greeting_that_takes_too_long_is_not_waited_for(path, monkeypatch):
    monkeypatch.setattr(doors, "GREETING_SECONDS", 0.0)
    with caller(path) as connection:
        with suppress(ConnectionError):  # the door may be faster
            connection.sendall(greeting(TOKEN)[:5])
        with suppress(ConnectionError):
            assert connection.recv(1) == b""
    monkeypatch.undo()
    assert asked(path).facts == {"asked": "hello"}


@pytest.mark.parametrize("begun", [b"", head(b'{"facts":', 9999), head(b'{"facts":{},"sizes":[60000]}') + b"abc"])
def test_a_request_that_drips_is_given_up(path, monkeypatch, begun):
    """The deadline is for the whole; each further byte would have begun a new one before."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.0)
    monkeypatch.setattr(protocol, "SLOWEST", 10**12)
    with caller(path) as connection:
        connection.sendall(greeting(TOKEN) + begun)
        with pytest.raises(ConnectionError):
            receive_parcel(connection)


def test_a_piece_that_comes_too_late_is_none(monkeypatch):
    near, far = socket.socketpair()
    with near, far:
        send_parcel(near, Parcel({}))
        times = iter([0.0, 1.0, 2.0, 99.0, 100.0, 101.0])
        monkeypatch.setattr(protocol.time, "monotonic", lambda: next(times))
        with pytest.raises(TimeoutError, match="in time"):
            receive_parcel(far, hurried=True)


def test_foreign_text_makes_no_lines_of_the_log():
    formatter = OneLine("%(levelname)s %(message)s")
    text = "x\n2026-01-01 INFO round 7 answered\x1b]52;c;\x07\u202e\x85\u2028\ud800é"
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        record = logging.LogRecord(
            "w", logging.ERROR, "", 0, "%s", (error,), (RuntimeError, error, error.__traceback__)
        )
    lines = formatter.format(record).splitlines()
    assert lines[0] == r"ERROR x\n2026-01-01 INFO round 7 answered\x1b]52;c;\x07\u202e\x85\u2028\ud800é"
    assert len(lines) > 3 and all(line.startswith("  | ") and line.isprintable() for line in lines[1:])
