"""A line that breaks in mid-transfer: Flower's own client and SuperLink, and every byte on the line counted."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from benchmarks.link import Lane, Link
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, Message
from flwr.app.message import remove_content_from_message
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.main import create_app
from flwr.supernode.fleet_http_connection import http_request_response

from fedloom.flower import transfer
from fedloom.flower.payload import ARRAYS, MOST_PIECES, PIECE, STYPE, Array, pack_parcel, piece_size, unpack_parcel
from fedloom.flower.transfer import pull_message, push_message
from fedloom.site.protocol import Parcel

pytestmark = pytest.mark.flower

AT_ONCE = 2
"""Objects that Flower has under way at the same time."""
BESIDE = 40_000
"""Bytes that may pass beside the payload: a request and an answer of some 1,000 bytes for each piece and message."""
FAST = 8e6


@pytest.fixture(scope="module")
def superlink() -> Iterator[tuple[int, LinkState]]:
    """The port of a SuperLink in this process, and what it holds."""
    app = create_app()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
    yield server.servers[0].sockets[0].getsockname()[1], app.state.linkstate_factory.state()
    server.should_exit = True
    thread.join(10)


class Site:
    """Flower's client of one site, at the other end of a line."""

    def __init__(self, state: LinkState, connection: tuple) -> None:
        self.state = state
        self.node, self.receive, self.send, *_, self.pull, self.push, self.confirm = connection

    def run(self) -> int:
        """A run that goes on."""
        run = self.state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, None, primary_task_type=TaskType.SERVER_APP
        )
        task = self.state.get_run_info(run_ids=[run])[0].primary_task_id
        assert self.state.claim_task(task) and self.state.activate_task(task)
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run, task, 1
        return run

    def post(self, message: Message, run: int) -> None:
        """What a server app's grid does with a message."""
        message.metadata.__dict__.update(_run_id=run, _src_node_id=1, _message_id=message.object_id)
        session = self.state.start_session(run)
        bare = remove_content_from_message(message)
        stored, missing = self.state.store_message_and_object_tree(bare, get_object_tree(message), session)
        assert stored
        for name, held in get_all_nested_objects(message).items():
            if name in missing:
                assert self.state.store_object(run, session, name, held.deflate())

    def take(self, run: int) -> Message:
        """What a node does to have a message."""
        bare, tree = self.receive()
        message = pull_message(run, tree, self.pull, self.confirm)
        message.metadata.__dict__["_message_id"] = bare.metadata.message_id
        return message

    def answer(self, message: Message) -> None:
        """What a node does with an answer."""
        message.metadata.__dict__.update(_message_id=message.object_id, _src_node_id=self.node)
        push_message(message, self.send, self.push)

    def answered(self, message: Message, run: int) -> Message:
        """The answer as the SuperLink has it."""
        names = get_all_nested_objects(message)
        return inflate_object_from_contents(
            message.object_id, {name: self.state.get_object(run, name) or b"" for name in names}
        )


@contextmanager
def site(superlink: tuple[int, LinkState], up: Lane, down: Lane) -> Iterator[tuple[Site, Link]]:
    """A site on a line. Flower keeps an error inside of the block to itself: look at what was done after it."""
    port, state = superlink
    with (
        Link(port, up, down) as link,
        http_request_response(f"127.0.0.1:{link.port}", insecure=True) as connection,
    ):
        yield Site(state, connection), link


def asked(payload: bytes, node: int) -> Message:
    return Message(pack_parcel(Parcel({"round": 1}, (payload,))), node, "train")


@pytest.mark.parametrize("broken", ["down", "up"])
def test_after_a_cut_only_what_was_under_way_is_sent_again(superlink, broken):
    down_payload, up_payload = (random.Random(f"{broken} {way}").randbytes(6 * PIECE + 1000) for way in ("down", "up"))
    cuts = {"down": (), "up": (), broken: (round(2.5 * PIECE),)}
    up, down = Lane(FAST, 0.001, cuts=cuts["up"]), Lane(FAST, 0.001, cuts=cuts["down"])
    arrived: list[Message] = []
    with site(superlink, up, down) as (here, link):
        run = here.run()
        here.post(asked(down_payload, here.node), run)
        arrived.append(here.take(run))
        answer = Message(pack_parcel(Parcel({}, (up_payload,))), reply_to=arrived[0])
        here.answer(answer)
        arrived.append(here.answered(answer, run))
    assert [unpack_parcel(message.content).payloads for message in arrived] == [(down_payload,), (up_payload,)]
    assert link.cuts == 1
    for lane, times in ((down, broken == "down"), (up, broken == "up")):
        assert 0 < lane.passed - len(up_payload) <= times * AT_ONCE * PIECE + BESIDE
    assert len(up_payload) > 2 * (AT_ONCE * PIECE + BESIDE), "or all of it might have been sent again"


def test_a_piece_whose_receipt_a_cut_swallowed_is_not_sent_again(superlink, monkeypatch):
    """Flower's client takes the SuperLink's "no such piece to come" for the end of the whole answer."""
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.0)
    payload, sent, arrived = random.Random(3).randbytes(4 * PIECE), [], []
    with site(superlink, Lane(FAST, 0.0), Lane(FAST, 0.0)) as (here, _):
        run = here.run()
        here.post(asked(b"?", here.node), run)
        answer = Message(pack_parcel(Parcel({}, (payload,))), reply_to=here.take(run))
        whole = here.push

        def push(run: int, session: str, name: str, content: bytes) -> None:
            whole(run, session, name, content)
            sent.append(name)
            if len(sent) == 3:
                whole(run, session, name, content)  # as Flower repeats what was stored, but not acknowledged

        here.push = push
        here.answer(answer)
        arrived.append(here.answered(answer, run))
    assert unpack_parcel(arrived[0].content).payloads == (payload,)
    assert len(sent) == len(set(sent)) == len(get_all_nested_objects(answer))


def test_what_has_been_pulled_is_kept_over_a_break_that_flower_gives_up_at(monkeypatch):
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.0)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    message = asked(random.Random(4).randbytes(3 * PIECE), 1)
    contents = {name: held.deflate() for name, held in get_all_nested_objects(message).items()}
    pulled: list[str] = []
    confirmed: list[str] = []

    def pull(run: int, name: str) -> bytes:
        if len(pulled) in (2, 4):
            pulled.append("broken")
            raise httpx.ReadError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol")
        pulled.append(name)
        return contents[name]

    tree = get_object_tree(message)
    back = pull_message(1, tree, pull, lambda run, name: confirmed.append(name))
    assert unpack_parcel(back.content) == unpack_parcel(message.content) and confirmed == [tree.object_id]
    assert pulled.count("broken") == 2 and sorted({*pulled} - {"broken"}) == sorted(contents)
    assert len(pulled) <= len(contents) + 2 + 2 * AT_ONCE


def test_a_line_that_never_holds_is_given_up(monkeypatch):
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.0)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    begun: list[Message] = []

    def send(message: Message, tree: object, seconds: float) -> tuple[set[str], str]:
        begun.append(message)
        raise httpx.ConnectError("no route")

    with pytest.raises(httpx.ConnectError):
        push_message(asked(b"x", 1), send, lambda *_: None)
    assert len(begun) == transfer.TRIES


@pytest.mark.parametrize("length", [1, PIECE, PIECE + 1, 3 * PIECE, MOST_PIECES * PIECE, MOST_PIECES * PIECE + 1])
def test_a_payload_travels_in_pieces_and_any_flower_puts_them_together(length):
    payload = bytes(length)
    (record,) = pack_parcel(Parcel({}, (payload,))).array_records.values()
    objects = get_all_nested_objects(record["bytes"])
    contents = {name: held.deflate() for name, held in objects.items()}
    pieces = record["bytes"].slice_array()
    assert len(pieces) == -(-length // piece_size(length)) <= MOST_PIECES
    assert max(map(len, contents.values())) <= piece_size(length) + 200
    back = inflate_object_from_contents(record["bytes"].object_id, contents)
    assert type(back) is FlowerArray and (back.data, back.stype) == (payload, STYPE)


def test_the_pieces_of_other_versions_are_read_as_well():
    payload = random.Random(1).randbytes(3 * PIECE)
    records = pack_parcel(Parcel({}, (payload,)))
    records[ARRAYS] = ArrayRecord({"bytes": FlowerArray("uint8", (len(payload),), STYPE, payload)})
    assert len(records[ARRAYS]["bytes"].slice_array()) == 1
    assert unpack_parcel(records).payloads == (payload,)


def test_an_array_whose_bytes_change_is_cut_anew():
    array = Array("uint8", (2,), STYPE, b"ab")
    before = array.object_id
    array.data = b"cd"
    assert array.object_id != before and bytes(array.slice_array()[0][1].data) == b"cd"
