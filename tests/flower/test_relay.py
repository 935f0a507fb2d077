"""The socket between ClientApp and worker: who may speak, what is read, and that a lost worker is waited for."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from desks import site
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import SiteError
from fedloom.flower import relay as client
from fedloom.flower.payload import FACTS, SIZES, pack_parcel, unpack_parcel
from fedloom.site import worker
from fedloom.site.calling import call_worker
from fedloom.site.desk import Desk
from fedloom.site.door import Door
from fedloom.site.protocol import MAGIC, Parcel, cut_payloads, parse_request, parse_sizes, receive_parcel, send_parcel

pytestmark = pytest.mark.flower

FACT = st.one_of(st.text(max_size=20), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.booleans())
PARCELS = st.builds(
    Parcel,
    st.dictionaries(st.text("abcdef", min_size=1, max_size=8), FACT, max_size=4),
    st.lists(st.binary(max_size=300), max_size=4).map(tuple),
)


@given(PARCELS)
def test_a_parcel_arrives_as_it_was_sent(parcel: Parcel):
    near, far = socket.socketpair()
    with near, far:
        send_parcel(near, parcel)
        assert receive_parcel(far) == parcel


@given(PARCELS)
def test_a_parcel_travels_in_a_message_of_flowers(parcel: Parcel):
    assert unpack_parcel(pack_parcel(parcel)) == parcel


def test_payloads_travel_as_one_opaque_array():
    records = pack_parcel(Parcel({"a": 1}, (b"one", b"two")))
    arrays = [array for record in records.array_records.values() for array in record.values()]
    assert [(array.dtype, array.shape, array.data) for array in arrays] == [("uint8", (6,), b"onetwo")]


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({FACTS: ConfigRecord({SIZES: [3]})}),
        RecordDict({FACTS: ConfigRecord({SIZES: [-1]})}),
        RecordDict({FACTS: ConfigRecord({SIZES: [2]}), "x": ArrayRecord({"a": Array("uint8", (2,), "other", b"ab")})}),
    ],
)
def test_a_message_that_is_none_of_ours_is_refused(content: RecordDict):
    with pytest.raises(SiteError):
        unpack_parcel(content)


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\n",
        MAGIC + struct.pack(">I", 2**31),
        MAGIC + struct.pack(">I", 2) + b"{]",
        MAGIC + struct.pack(">I", 2) + b"[]",
        MAGIC + struct.pack(">I", 26) + b'{"facts":{},"sizes":[-1]} ',
        MAGIC + struct.pack(">I", 38) + b'{"facts":{"a":{}},"sizes":[0]}        ',
        MAGIC + struct.pack(">I", 45) + b'{"facts":{},"sizes":[8589934592,8589934592]} ',
    ],
)
def test_bytes_that_are_no_parcel_are_refused(sent: bytes):
    near, far = socket.socketpair()
    with near, far:
        near.sendall(sent)
        near.shutdown(socket.SHUT_WR)
        with pytest.raises((SiteError, ConnectionError)):
            receive_parcel(far)


def test_lengths_must_fill_the_content():
    assert cut_payloads(b"abc", [1, 0, 2]) == (b"a", b"", b"bc")
    with pytest.raises(SiteError, match="announced"):
        cut_payloads(b"abc", [4])
    with pytest.raises(SiteError, match="lengths"):
        parse_sizes([2**34])


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"ask": "format", "job": "0" * 16, "settings": "", "base": ""},
        {"ask": "turn", "job": "../../../../etc", "settings": "", "base": ""},
        {"ask": "turn", "job": "0" * 16, "settings": "", "base": "", "round": -1},
        {"ask": "turn", "job": "0" * 16, "settings": "", "base": "", "protocol": "2"},
    ],
)
def test_requests_that_no_worker_knows_are_refused(facts: dict):
    with pytest.raises(SiteError, match="no request that a worker knows"):
        parse_request(facts)


@pytest.fixture
def serving(tmp_path: Path):
    """A worker's loop in a thread, with a desk that repeats what it is asked."""

    class Echo(Desk):
        def answer(self, parcel: Parcel) -> Parcel:
            return Parcel({"asked": str(parcel.facts.get("ask"))}, parcel.payloads)

    place = site("bank", tmp_path)
    token = worker.own_token(Path(place.token_file))
    listener = worker._listening(Path(place.socket))
    door = Door(listener, token)
    ended = threading.Event()

    def loop() -> None:
        while not ended.is_set():
            connection = door.next_caller(0.02)
            if connection is not None:
                with connection:
                    worker._serve_one(connection, Echo(place))

    thread = threading.Thread(target=loop)
    thread.start()
    yield Path(place.socket), Path(place.token_file)
    ended.set()
    thread.join()
    door.close()
    listener.close()


def test_the_worker_answers_those_who_show_the_token_alone(serving, tmp_path: Path):
    path, token = serving
    assert path.stat().st_mode & 0o777 == 0o600 and token.stat().st_mode & 0o777 == 0o600
    reply = call_worker(Parcel({"ask": "hello"}, (b"12",)), path, token)
    assert reply == Parcel({"asked": "hello"}, (b"12",))
    (tmp_path / "wrong").write_text("0" * 64)
    assert call_worker(Parcel({"ask": "hello"}), path, tmp_path / "wrong").facts == {
        "error": "the token is wrong",
        "protocol": 2,
    }
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(str(path))
        rude.sendall(b"rubbish" * 10)
    assert call_worker(Parcel({"ask": "hello"}), path, token).facts == {"asked": "hello"}


def test_a_token_that_others_may_read_is_refused(tmp_path: Path):
    path = tmp_path / "token"
    path.write_text("secret")
    path.chmod(0o644)
    with pytest.raises(SiteError, match="chmod 600"):
        worker.own_token(path)


def test_a_worker_that_does_not_come_back_is_an_error(tmp_path: Path):
    (tmp_path / "token").write_text("x")
    began = time.monotonic()
    with pytest.raises(SiteError, match="the worker is away"):
        call_worker(Parcel({}), tmp_path / "nobody.sock", tmp_path / "token", patience=0.1)
    assert time.monotonic() - began >= 0.1


def test_a_supernode_must_name_its_worker():
    with pytest.raises(SiteError, match="worker-socket"):
        client.worker_files(Context(1, 2, {}, RecordDict(), {}))


def test_the_client_app_loads_no_torch():
    code = "import sys, fedloom.flower.relay; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.strip() == "False"


def test_an_idle_worker_lets_go_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    released = threading.Event()

    class Loaded(Desk):
        def release(self, idle_seconds: float = -1.0) -> None:
            assert idle_seconds == 0.02
            released.set()

    desk = Loaded(site("bank", tmp_path))
    monkeypatch.setattr(worker, "TICK_SECONDS", 0.01)
    listener = worker._listening(Path(desk.site.socket))
    thread = threading.Thread(target=_until_closed, args=(listener, desk))
    thread.start()
    assert released.wait(60)
    listener.close()
    thread.join()


def _until_closed(listener: socket.socket, desk: Desk) -> None:
    with contextlib.suppress(OSError, ValueError):
        worker._loop(Door(listener, "token"), desk, 0.02)
