"""`fedloom node` between a made-up SuperLink and a worker: what is carried, in which order, and what is refused."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import desks
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from fedloom.errors import SiteError
from fedloom.flower.node.link import StoppedError
from fedloom.flower.node.refusals import RunOver
from fedloom.flower.node.service import BUSY_PAUSE, FIRST_PAUSE, LAST_PAUSE, Carrier
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.flower.settings import shared_settings
from fedloom.model.identity import base_digest
from fedloom.records.ledger import Training, read_rows
from fedloom.site.desk import Desk
from fedloom.site.protocol import SPOKEN, Parcel, error_parcel, parse_request

pytestmark = pytest.mark.flower
JOB = "0123456789abcdef"
WAIT = 60.0
NUMBERS = itertools.count(1)


class Way:
    """A SuperLink's part of a node: messages to be pulled, answers that were handed over."""

    def __init__(self, settings: str | None = "") -> None:
        self.settings: dict[int, str | None] = {1: settings, 2: settings}
        self.waiting: list[Message] = []
        self.messages: dict[str, Message] = {}
        self.answers: dict[str, Message] = {}
        self.order: list[str] = []
        self.beats = 0

    def post(self, facts: dict, payloads: tuple[bytes, ...] = (), *, run: int = 1, age: float = 0.0) -> str:
        """A message that the server sent `age` seconds ago; its identifier."""
        asked = {"job": JOB, "base": "b", "round": 1, "protocol": SPOKEN.newest} | facts
        return self.put(pack_parcel(Parcel(asked, payloads)), run=run, age=age)

    def put(self, content: RecordDict, *, run: int = 1, age: float = 0.0) -> str:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run, 1, 1  # what Flower's runtime sets
        message = Message(content, 7, "train", ttl=600.0, group_id=str(next(NUMBERS)))
        message.metadata.__dict__["_created_at"] -= age
        message.metadata.__dict__.update(_message_id=message.object_id, _run_id=run, _src_node_id=1)
        self.waiting.append(message)
        self.messages[message.metadata.message_id] = message
        return str(message.metadata.message_id)

    def beat(self) -> None:
        self.beats += 1

    def pull(self) -> tuple[Message, ObjectTree] | None:
        if not self.waiting:
            return None
        message = self.waiting.pop(0)
        return message, ObjectTree(object_id=message.metadata.message_id)

    def read(self, run: int, tree: ObjectTree, most: int) -> Message:
        message = self.messages[tree.object_id]
        if sum(map(len, unpack_parcel(message.content).payloads)) > most:
            raise SiteError("too much")
        return message

    def hand_over(self, reply: Message, seconds: float) -> None:
        get_object_tree(reply)  # it can be sent
        self.order.append(reply.metadata.reply_to_message_id)
        self.answers[reply.metadata.reply_to_message_id] = reply

    def settings_of(self, run: int) -> str | None:
        if run not in self.settings:
            raise RunOver
        return self.settings[run]

    def facts(self, identifier: str) -> dict:
        return dict(unpack_parcel(self.answers[identifier].content).facts)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


class Worker:
    """Takes one request at a time, and a turn for as long as `free` is not set; withdrawals come in between."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.asked: list[tuple[str, str, int]] = []
        self.busy = threading.Lock()
        self.training: tuple[str, int] | None = None
        self.stopped = False

    def __call__(self, parcel: Parcel, patience: float = 0.0) -> Parcel:
        asked = parse_request(parcel.facts)
        self.asked.append((asked.ask, asked.job, asked.round))
        if asked.ask == "withdraw":
            self.stopped |= self.training == (asked.job, asked.round)
            return Parcel({"protocol": SPOKEN.newest})
        assert self.busy.acquire(blocking=False), "two requests at once"
        try:
            if asked.ask == "turn":
                self.training = (asked.job, asked.round)
                while not self.free.is_set() and not self.stopped:
                    time.sleep(0.002)
                self.training = None
            facts = {"settings": asked.settings, "expires": asked.expires or 0.0}
            return Parcel({"dropped": "withdrawn"} if self.stopped else facts, parcel.payloads)
        finally:
            self.stopped = False
            self.busy.release()


@pytest.fixture
def carried(monkeypatch):
    """(way, worker, carrier): the carrier carries in a thread until the test is over."""
    monkeypatch.setattr("fedloom.flower.node.service.FIRST_PAUSE", 0.002)
    monkeypatch.setattr("fedloom.flower.node.service.BUSY_PAUSE", 0.004)
    monkeypatch.setattr("fedloom.flower.node.service.REPEAT_SECONDS", 0.01)
    way, worker, stop = Way("the settings"), Worker(), threading.Event()
    carrier = Carrier(way, worker, 1000, stop)
    thread = threading.Thread(target=carrier.carry)
    thread.start()
    yield way, worker, carrier
    stop.set()
    worker.free.set()
    thread.join(WAIT)


def test_a_request_gets_the_workers_answer_with_the_runs_settings(carried):
    way, worker, _ = carried
    sent = way.post({"ask": "turn"}, (b"one", b"two"))
    wait_until(lambda: sent in way.answers)
    assert way.facts(sent)["settings"] == "the settings"
    assert unpack_parcel(way.answers[sent].content).payloads == (b"one", b"two")
    assert way.beats and worker.asked == [("turn", JOB, 1)]


def test_a_run_cannot_give_other_settings_in_a_message(carried):
    way, _, _ = carried
    sent = way.post({"ask": "hello", "settings": "others"})
    wait_until(lambda: sent in way.answers)
    assert way.facts(sent)["settings"] == "the settings"


def test_several_runs_wait_for_one_another_at_the_worker_alone(carried):
    way, worker, _ = carried
    worker.free.clear()
    turns = [way.post({"ask": "turn", "job": job * 16}, run=run) for run, job in ((1, "a"), (2, "b"))]
    wait_until(lambda: not way.waiting and len(worker.asked) == 1)
    refused = way.put(RecordDict())  # what needs no worker is answered meanwhile
    wait_until(lambda: refused in way.answers)
    assert len(worker.asked) == 1 and worker.training is not None
    worker.free.set()
    wait_until(lambda: len(way.answers) == 3)
    assert set(way.order) == {refused, *turns} and len(worker.asked) == 2


def test_a_withdrawal_reaches_the_worker_while_it_trains_and_is_answered_when_that_is_over(carried):
    way, worker, _ = carried
    worker.free.clear()
    turn = way.post({"ask": "turn", "round": 2})
    wait_until(lambda: worker.training)
    withdrawal = way.post({"ask": "withdraw", "round": 2})
    wait_until(lambda: withdrawal in way.answers and turn in way.answers)
    assert way.facts(turn)["dropped"] == "withdrawn" and "error" not in way.facts(withdrawal)


def test_the_withdrawal_of_another_turn_stops_nothing(carried):
    way, worker, _ = carried
    worker.free.clear()
    turn = way.post({"ask": "turn", "round": 2})
    wait_until(lambda: worker.training)
    withdrawal = way.post({"ask": "withdraw", "round": 1})
    wait_until(lambda: withdrawal in way.answers)
    assert turn not in way.answers
    worker.free.set()
    wait_until(lambda: turn in way.answers)
    assert "dropped" not in way.facts(turn)


def test_a_turn_that_waits_is_withdrawn_without_the_worker(carried):
    way, worker, _ = carried
    worker.free.clear()
    first = way.post({"ask": "turn", "job": "a" * 16}, run=2)
    wait_until(lambda: worker.training)
    second = way.post({"ask": "turn", "round": 3})
    wait_until(lambda: not way.waiting)
    withdrawal = way.post({"ask": "withdraw", "round": 3})
    wait_until(lambda: withdrawal in way.answers and second in way.answers)
    assert way.facts(second)["dropped"] == "withdrawn" and first not in way.answers
    assert ("turn", JOB, 3) not in worker.asked


def test_a_turn_whose_time_is_over_is_answered_without_the_worker(carried):
    way, worker, _ = carried
    worker.free.clear()
    way.post({"ask": "turn", "job": "a" * 16}, run=2)
    wait_until(lambda: worker.training)
    late = way.post({"ask": "turn", "round": 3, "expires": 0.05})
    wait_until(lambda: late in way.answers)
    assert way.facts(late)["dropped"] == "expired" and len(worker.asked) == 1


def test_the_worker_is_told_how_long_a_turn_is_worth_beginning_from_now(carried):
    way, _, _ = carried
    sent = way.post({"ask": "turn", "expires": 100.0})
    wait_until(lambda: sent in way.answers)
    assert 0 < way.facts(sent)["expires"] < 100.0


def test_what_nobody_waits_for_any_more_is_not_sent(carried):
    way, worker, carrier = carried
    over = way.post({"ask": "hello"}, age=601.0)
    unknown = way.post({"ask": "hello"}, run=3)  # its run is over
    last = way.post({"ask": "hello"})
    wait_until(lambda: last in way.answers)
    wait_until(lambda: not carrier._at_work)
    assert over not in way.answers and unknown not in way.answers


def test_a_message_that_is_not_fedlooms_is_refused_in_words(carried):
    way, worker, _ = carried
    sent = way.put(RecordDict({"config": ConfigRecord({"lr": 0.1})}))
    wait_until(lambda: sent in way.answers)
    error = way.answers[sent].error
    assert "messages of fedloom alone" in error.reason and "runs no code" in error.reason and not worker.asked


def test_a_run_of_an_older_server_is_told_what_to_do(carried):
    way, worker, _ = carried
    way.settings[1] = None
    sent = way.post({"ask": "hello"})
    wait_until(lambda: sent in way.answers)
    assert "supernode.sh" in way.facts(sent)["error"] and not worker.asked


def test_a_worker_that_stays_away_is_an_answer(carried):
    way, _, carrier = carried

    def away(parcel: Parcel, patience: float = 0.0) -> Parcel:
        raise SiteError("the worker is away")

    carrier.ask_worker = away
    sent = [way.post({"ask": what}) for what in ("hello", "withdraw")]
    wait_until(lambda: all(one in way.answers for one in sent))
    assert all("worker is away" in way.facts(one)["error"] for one in sent)


def test_looks_are_frequent_in_a_run_rarer_while_the_worker_trains_and_rare_at_rest():
    carrier = Carrier(Way(), Worker(), 1000, threading.Event())
    assert carrier.pause() == FIRST_PAUSE
    carrier._heard -= 30
    assert carrier.pause() == pytest.approx(1.0, abs=0.1)
    carrier._heard -= 600
    assert carrier.pause() == LAST_PAUSE
    carrier._heard = time.monotonic()
    carrier.line._held.append(object())
    assert carrier.pause() == BUSY_PAUSE


def test_a_node_that_is_killed_costs_no_training(monkeypatch, tmp_path: Path):
    """The first node is lost with the answer; the server asks the next one again: the same bytes, trained once."""
    monkeypatch.setattr("fedloom.site.setups.build_setup", desks.assemble)
    desk = Desk(desks.site("lab", tmp_path))
    way = Way(shared_settings(desks.settings()))
    facts = {"ask": "turn", "base": base_digest(desk.site.model)}
    lost: list[Message] = []

    class Killed(Way):
        def hand_over(self, reply: Message, seconds: float) -> None:
            lost.append(reply)
            raise StoppedError

    for held in (Killed(way.settings[1]), way):
        carrier = Carrier(held, lambda parcel, patience=0.0: desk.answer(parcel), 10**6, threading.Event())
        sent = held.post(facts)
        pulled = held.pull()
        assert pulled is not None
        carrier.take(*pulled).join(WAIT)
    payloads = unpack_parcel(way.answers[sent].content).payloads
    assert payloads and payloads == unpack_parcel(lost[0].content).payloads
    rows = read_rows(tmp_path / "lab" / "jobs" / JOB / "ledger.jsonl")
    assert sum(isinstance(row, Training) for row in rows) == 1
    desk.close()


def test_an_error_of_the_workers_goes_to_the_server_as_it_is(carried):
    way, _, carrier = carried
    carrier.ask_worker = lambda parcel, patience=0.0: error_parcel("refused by the site's policy")
    sent = way.post({"ask": "turn"})
    wait_until(lambda: sent in way.answers)
    assert way.facts(sent)["error"] == "refused by the site's policy"
