"""The slow line is as slow as asked, carries every byte, and the round's times add up."""

import contextlib
import socket
import threading
import time

import pytest
from benchmarks.link import PACKET, PIECE, Lane, Link

from benchmarks import wan
from fedloom.errors import ConfigError
from fedloom.wire import decode


def test_a_piece_leaves_when_those_before_it_have():
    lane = Lane(rate=1000.0, delay=9.0)
    assert [lane.take(500, 0.0), lane.take(500, 0.0), lane.take(1000, 5.0)] == [(0.5, 9.5), (1.0, 10.0), (6.0, 15.0)]
    assert lane.passed == 2000 and not lane.breaks()


def test_what_is_lost_takes_its_time_once_more_and_arrives_a_trip_later():
    lane = Lane(rate=1000.0, delay=1.0, loss=1.0)
    assert lane.take(2 * PACKET, 0.0) == (4 * PACKET / 1000, 4 * PACKET / 1000 + 3.0)
    some = Lane(rate=1.0, delay=0.0, loss=0.02, seed=5)
    repeated = some.take(100_000 * PACKET, 0.0).left / PACKET - 100_000
    assert 1900 < repeated < 2100  # 2 % of 100,000, within some standard deviations of 44


def test_a_line_breaks_once_for_every_cut():
    lane = Lane(rate=1.0, delay=0.0, cuts=(30, 10))
    assert [lane.take(10, 0.0) and lane.breaks() for _ in range(5)] == [True, False, True, False, False]


@pytest.fixture
def echo():
    """A server that sends back what it is sent."""

    def serve(listener):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            while piece := connection.recv(PIECE):
                connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(timeout=10)


def test_bytes_arrive_unchanged_and_not_before_the_line_allows(echo):
    content = bytes(range(256)) * 800
    with Link(echo, Lane(400_000, 0.05), Lane(10**9, 0.05)) as link:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", link.port)) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            back = b"".join(iter(lambda: connection.recv(65536), b""))
        taken = time.monotonic() - began
    assert back == content
    # Half a second for the bytes, a tenth for the way there and back. How much longer it may take is the machine's.
    assert taken >= len(content) / 400_000 + 0.1


def test_a_cut_resets_what_is_open_and_nobody_comes_back_before_the_outage_is_over(echo):
    with Link(echo, Lane(10**9, 0.0, cuts=(40_000,)), Lane(10**9, 0.0), outage=60.0) as link:
        with socket.create_connection(("127.0.0.1", link.port)) as connection, pytest.raises(ConnectionError):
            connection.sendall(bytes(40_000))
            while connection.recv(65536):
                pass
        with socket.create_connection(("127.0.0.1", link.port)) as connection, pytest.raises(ConnectionError):
            connection.recv(1)
        assert link.cuts == 1 and link.up.passed == 40_000


@pytest.fixture(scope="module")
def result():
    runs = ("fedit:fp32", "fedsrd:fp32", "fedsrd:int4")
    return wan.run("tinyllama", runs, rank=4, layers=1, clients=2, line=wan.Line(10, 50, 8), scale=1.0)


def test_payloads_are_those_of_real_rounds(result):
    fedit, lossless, coded = result["rows"]
    assert result["workload"]["parameters"] == 4 * sum(
        m + n for m, n in wan.preset_shapes(wan.preset_named("tinyllama"), layers=1).values()
    )
    assert fedit["up_bytes"] > 5 * lossless["up_bytes"] > 5 * coded["up_bytes"]
    assert lossless["down_bytes"] > coded["down_bytes"]


def test_every_client_sends_a_change_of_its_own(monkeypatch):
    """Said once: one payload under every name, which costs the server another sum than clients who differ."""
    rounds, real = [], wan.server_turn

    def server_turn(job, state, payloads, round):
        rounds.append({client: decode(payload).entries for client, payload in payloads.items()})
        return real(job, state, payloads, round)

    monkeypatch.setattr(wan, "server_turn", server_turn)
    wan.run("tinyllama", ("fedit:fp32",), rank=2, layers=1, clients=3, scale=50.0)
    sent = [bytes(entries["layers.0.q_proj/A"].values.numpy()) for told in rounds for entries in told.values()]
    assert [len(told) for told in rounds] == [3, 3] and len(set(sent)) == 6


def test_no_row_is_faster_than_its_line_and_times_add_up(result):
    for row in result["rows"]:
        assert row["down_s"] + row["up_s"] >= row["floor_s"]
        assert row["total_s"] == pytest.approx(sum(row[key] for key in ("client_s", "down_s", "up_s", "server_s")))
    text = [str(column.header) for column in next(iter(wan.tables(result))).columns]
    assert "round s" in text and "floor s" in text


def test_a_faster_line_is_counted_back():
    rows = wan.run("tinyllama", ("fedit:fp32",), rank=2, layers=1, clients=1, scale=20.0)["rows"]
    assert rows[0]["down_s"] + rows[0]["up_s"] >= rows[0]["floor_s"] and rows[0]["scale"] == 20.0


@pytest.mark.parametrize("runs", ["fedit", "nothing:fp32", "fedit:int3"])
def test_wrong_runs_are_refused(runs):
    with pytest.raises(ConfigError):
        wan.run("tinyllama", (runs,), rank=1, layers=1)
