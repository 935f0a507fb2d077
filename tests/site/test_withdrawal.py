"""A turn that is withdrawn while it trains: it stops at once, leaves no trace, and is trained afresh if asked again."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import tomli_w

from fedloom.errors import SiteError
from fedloom.model.identity import base_digest
from fedloom.site import worker
from fedloom.site.calling import call_worker
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.door import Door
from fedloom.site.privacy import Privacy
from fedloom.site.protocol import Parcel
from fedloom.site.rules import Policy

SETTINGS = {
    "federation": {"participants": ["bank", "lab"], "num_rounds": 3, "seed": 1},
    "training": {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
    "data": {"template": "plain", "max_length": 32},
    "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "method": {"name": "fedsrd"},
}
JOB = "a" * 16
NOISE = Policy(order="run", privacy=Privacy(clip_norm=1.0, noise_multiplier=2.0))


def made(base: Path, state: Path, policy: Policy | None = None) -> Desk:
    paths = {"model": str(base / "model"), "data": str(base / "data.jsonl"), "state": str(state)}
    files = {"socket": str(state.parent / "s"), "token_file": str(state.parent / "t")}
    policy = policy or Policy(order="run")
    return Desk(SiteConfig(name="lab", device="cpu", threads=1, policy=policy, **paths, **files))


def request(desk: Desk, what: str = "turn", round: int = 1, **more) -> Parcel:
    facts = {"ask": what, "job": JOB, "settings": tomli_w.dumps(SETTINGS), "round": round, "protocol": 2} | more
    return Parcel({**facts, "base": base_digest(desk.site.model)})


def withdrawn_at(desk: Desk, pass_number: int, **more) -> list[int]:
    """Have the turn withdrawn as the desk looks for the so-manieth time; how often it looked is in the list."""
    looks = [0]

    def look() -> None:
        looks[0] += 1
        if looks[0] == pass_number:
            said = desk.wanted.answer(request(desk, "withdraw", **more))
            assert said.facts["stops"] is not more

    desk.wanted.look = look
    return looks


@pytest.mark.parametrize(
    ("policy", "pass_number"),
    [(None, 1), (None, 2), (NOISE, 4)],
    ids=["before the first pass", "between two", "after the last, before noise is drawn"],
)
def test_a_withdrawn_turn_leaves_no_trace_and_is_trained_afresh_to_the_same_bits(tmp_path, base, policy, pass_number):
    desk = made(base, tmp_path / "one", policy)
    desk.answer(request(desk, "hello", 0))
    before = files(tmp_path / "one")
    looks = withdrawn_at(desk, pass_number)
    reply = desk.answer(request(desk))
    assert reply.facts["dropped"] == "withdrawn" and "error" not in reply.facts and not reply.payloads
    assert looks == [pass_number]  # nothing was computed after it
    assert files(tmp_path / "one") == before and desk.trail.lines() == []
    again = desk.answer(request(desk))
    assert len(again.payloads) == 1
    if policy is None:
        other = made(base, tmp_path / "other")
        assert other.answer(request(other)).payloads == again.payloads
        other.close()
    desk.close()


def files(state: Path) -> dict[str, bytes]:
    """What a job has left, beside the file that says what the worker is at."""
    return {str(path): path.read_bytes() for path in state.rglob("*") if path.is_file() and path.name != "worker.json"}


def test_the_withdrawal_of_another_turn_stops_nothing(tmp_path, base):
    desk = made(base, tmp_path / "state")
    withdrawn_at(desk, 2, round=3)
    assert len(desk.answer(request(desk)).payloads) == 1
    assert desk.answer(request(desk, "withdraw")).payloads == ()  # it comes too late and does no harm
    desk.close()


def test_a_turn_that_has_waited_too_long_is_not_begun(tmp_path, base):
    desk = made(base, tmp_path / "state")
    reply = desk.answer(request(desk, expires=30.0), waited=31.0)
    assert reply.facts["dropped"] == "expired" and not reply.payloads and desk.trail.lines() == []
    assert desk.answer(request(desk, expires=30.0), waited=1.0).payloads
    desk.close()


def test_only_a_withdrawal_may_come_in_while_a_turn_trains(tmp_path, base):
    with pytest.raises(SiteError, match="a withdrawal alone"):
        desk = made(base, tmp_path / "state")
        desk.wanted.answer(request(desk, "turn"))


def test_over_the_socket_a_withdrawal_overtakes_requests_that_wait(tmp_path, base):
    """The worker's own loop; the turn trains until it is withdrawn, however long that takes."""
    desk = made(base, tmp_path / "state")
    (tmp_path / "t").write_text("token")
    training, replies, ended = threading.Event(), {}, threading.Event()

    def ask(name: str, parcel: Parcel) -> threading.Thread:
        def call() -> None:
            replies[name] = call_worker(parcel, tmp_path / "s", tmp_path / "t", 60)

        thread = threading.Thread(target=call)
        thread.start()
        return thread

    def serve() -> None:
        try:
            worker._loop(door, desk, 600.0)
        except _Over:
            ended.set()

    with worker._listening(tmp_path / "s") as listener:
        door = Door(listener, "token")
        guard = desk.wanted.guard

        def slow_guard(*checks):
            check = guard(*checks)

            def passes() -> None:
                training.set()
                while len(replies) < 1:  # the first reply of all is the withdrawal's
                    check()
                    time.sleep(0.005)

            return passes

        desk.wanted.guard = slow_guard
        loop = threading.Thread(target=serve)
        loop.start()
        turn = ask("turn", request(desk))
        assert training.wait(60)
        waiting = ask("hello", request(desk, "hello", 0))
        withdrawal = ask("withdrawal", request(desk, "withdraw"))
        for thread in (withdrawal, turn, waiting):
            thread.join(60)
        desk.release = _end
        loop.join(60)
        door.close()
    assert replies["withdrawal"].facts["stops"] is True
    assert replies["turn"].facts["dropped"] == "withdrawn" and replies["hello"].facts["name"] == "lab"
    assert next(iter(replies)) in ("withdrawal", "turn") and list(replies)[-1] == "hello" and ended.is_set()
    desk.close()


class _Over(Exception):
    pass


def _end(idle_seconds: float) -> None:
    raise _Over
