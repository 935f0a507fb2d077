"""What an update must be before it is averaged, what a broadcast must be before it is kept, and rounds that go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedloom.compress.entries import Dense, Sparse, count, dense_entry, to_dense
from fedloom.errors import FedloomError, NumericError, RoundError, ShapeError, WireError
from fedloom.lora.pair import digest
from fedloom.methods.method import Method, Update
from fedloom.methods.table import METHODS, build
from fedloom.rounds import turns as rounds
from fedloom.rounds.caps import USUAL
from fedloom.rounds.checks import check_update
from fedloom.rounds.job import sender_digest
from fedloom.rounds.turns import accept, client_turn, full_state, server_turn
from fedloom.wire import Message, decode, encode
from toy import SHAPES, Federation, job

names = pytest.mark.parametrize("name", sorted(METHODS))
MODULE = min(SHAPES)


def uploads(federation: Federation, round: int = 1) -> dict[str, bytes]:
    return {
        client: client_turn(federation.job, client, state, [], federation.training(client), round).payload
        for client, state in federation.clients.items()
    }


def named(name: str) -> Method:
    """The method, its tensors named one by one: tests/methods and test_joint spoil those that travel together."""
    return replace(build(name), joins=False)


def changed(payload: bytes, entries=None, **header) -> bytes:
    message = decode(payload)
    return encode(Message(replace(message.header, **header), {**message.entries, **(entries or {})}))


def ranked(payload: bytes, a: int, b: int) -> bytes:
    """The update with factors of other ranks in one module."""
    m, n = SHAPES[MODULE]
    wanted = {f"{MODULE}/A": torch.ones(a, n), f"{MODULE}/B": torch.ones(m, b), f"{MODULE}/R": torch.ones(a, b)}
    wanted[f"{MODULE}/S"] = torch.ones(a, b)
    return changed(payload, {name: dense_entry(t) for name, t in wanted.items() if name in decode(payload).entries})


@names
@pytest.mark.parametrize("spoil", ["scalar", "vector", "mixed ranks", "rank 0", "rank 5"])
def test_an_update_of_the_wrong_form_is_refused_and_the_others_are_averaged(name: str, spoil: str):
    federation = Federation(job(named(name)))
    payloads = uploads(federation)
    first = min(decode(payloads["bob"]).entries)
    if spoil == "mixed ranks" and f"{MODULE}/A" not in decode(payloads["bob"]).entries:
        pytest.skip("one factor alone has one rank, and a lower one is a client's own affair")
    vector = Dense((4,), torch.ones(4))  # which scalars along directions are
    bad = {
        "scalar": lambda p: changed(p, {first: Dense((), torch.ones(1))}),
        "vector": lambda p: changed(p, {first: Dense((4, 1, 1), torch.ones(4)) if first[-1] == "S" else vector}),
        "mixed ranks": lambda p: ranked(p, 4, 3),
        "rank 0": lambda p: ranked(p, 0, 0),
        "rank 5": lambda p: ranked(p, 5, 5),
    }[spoil](payloads["bob"])
    turn = server_turn(federation.job, federation.server, {**payloads, "bob": bad}, 1)
    rest = server_turn(federation.job, federation.server, {c: p for c, p in payloads.items() if c != "bob"}, 1)
    assert set(turn.refused) == {"bob"} and "has shape" in turn.refused["bob"]
    assert (turn.payload, turn.state.digest) == (rest.payload, rest.state.digest)


@pytest.mark.parametrize("name", sorted(n for n in METHODS if build(n).facts.unequal_ranks))
def test_a_client_sends_the_ranks_that_it_was_announced_with(name: str):
    federation = Federation(job(build(name)), {"ada": 4, "bob": 2, "cyd": 1})
    payloads = uploads(federation)
    run = replace(federation.job, ranks=federation.ranks)
    assert not server_turn(run, federation.server, payloads, 1).refused
    wrong = replace(federation.job, ranks={**federation.ranks, "bob": dict.fromkeys(SHAPES, 3)})
    assert "rank 3" in server_turn(wrong, federation.server, payloads, 1).refused["bob"]


def test_a_client_sends_the_modules_that_it_was_announced_with():
    federation = Federation(job(build("fedit")), {"ada": 4, "bob": {MODULE: 4}})
    payloads = uploads(federation)
    run = replace(federation.job, ranks=federation.ranks)
    assert not server_turn(run, federation.server, payloads, 1).refused
    run = replace(federation.job, ranks={**federation.ranks, "bob": dict.fromkeys(SHAPES, 4)})
    assert "lacks tensor" in server_turn(run, federation.server, payloads, 1).refused["bob"]


def test_an_update_counts_for_the_client_that_it_names_alone():
    federation = Federation(job(build("fedit")))
    payloads = uploads(federation)
    turn = server_turn(federation.job, federation.server, {**payloads, "cyd": payloads["bob"]}, 1)
    assert set(turn.refused) == {"cyd"} and "does not name 'cyd' as its sender" in turn.refused["cyd"]
    nobody = changed(payloads["cyd"], result_digest="")
    assert (
        "as its sender"
        in server_turn(federation.job, federation.server, {"cyd": nobody, "bob": payloads["bob"]}, 1).refused["cyd"]
    )


def test_a_sender_is_named_for_one_round_of_one_state():
    made = {
        sender_digest(*of) for of in (("a", "d", 1), ("b", "d", 1), ("a", "e", 1), ("a", "d", 2), ("a\ud800", "", 1))
    }
    assert len(made) == 5 and all(len(one) == 32 for one in made)


def test_no_update_rests_on_more_examples_than_there_can_be():
    federation = Federation(job(build("fedit"), weighting="uniform"))
    payloads = uploads(federation)
    payloads["bob"] = changed(payloads["bob"], num_examples=2**62)
    assert "1,000,000,000 at most" in server_turn(federation.job, federation.server, payloads, 1).refused["bob"]


def test_the_check_hands_on_what_it_saw():
    federation = Federation(job(build("fedsrd"), values="int8"))
    payload = uploads(federation)["bob"]
    seen = check_update(federation.job, federation.server, "bob", payload, 1)
    message = decode(payload)
    norm = sum(float(to_dense(entry).double().square().sum()) for entry in message.entries.values()) ** 0.5
    assert (seen.examples, seen.modules) == (message.header.num_examples, frozenset(SHAPES))
    assert seen.norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-30, 1e-10, 1.0, 1e10, 1e30, 3e38])
def test_a_norm_neither_overflows_nor_vanishes(size: float):
    federation = Federation(job(build("fedit")))
    payload = uploads(federation)["bob"]
    entries = {n: Dense(e.shape, torch.full((count(e.shape),), size)) for n, e in decode(payload).entries.items()}
    values = sum(count(entry.shape) for entry in entries.values())
    seen = check_update(federation.job, federation.server, "bob", changed(payload, entries), 1)
    assert seen.norm == pytest.approx(float(torch.tensor(size)) * values**0.5, rel=1e-4)


def test_what_was_seen_before_is_not_read_again(monkeypatch):
    federation = Federation(job(build("fedit")))
    payloads = uploads(federation)
    seen = {c: check_update(federation.job, federation.server, c, p, 1) for c, p in payloads.items()}
    whole = server_turn(federation.job, federation.server, payloads, 1)
    monkeypatch.setattr(rounds, "check_update", None)
    assert server_turn(federation.job, federation.server, payloads, 1, seen=seen).payload == whole.payload


def failing(federation: Federation, when) -> None:
    """Let the method stumble: `when` is handed each update, and None after the last."""
    plain = federation.job.method.aggregate

    def aggregate(state, updates, context):
        def read():
            for update in updates:
                when(update)
                yield update

        result = plain(state, list(read()), context)
        when(None)
        return result

    federation.job = replace(federation.job, method=replace(federation.job.method, aggregate=aggregate))


def test_whoever_makes_the_method_fail_is_refused_by_name_whatever_the_error():
    federation = Federation(job(build("fedit")))
    payloads = uploads(federation)
    rest = server_turn(federation.job, federation.server, {c: p for c, p in payloads.items() if c != "bob"}, 1)

    def when(update: Update | None):
        if update and update.client == "bob":
            raise IndexError("list index out of range")

    failing(federation, when)
    turn = server_turn(federation.job, federation.server, payloads, 1)
    assert set(turn.refused) == {"bob"} and "IndexError" in turn.refused["bob"]
    assert turn.payload == rest.payload


def test_where_the_failure_comes_later_the_largest_update_goes_first():
    federation = Federation(job(build("fedit")))
    payloads, present = uploads(federation), set()
    message = decode(payloads["cyd"])
    large = {name: dense_entry(to_dense(entry) * 50) for name, entry in message.entries.items()}
    payloads["cyd"] = changed(payloads["cyd"], large)

    def when(update: Update | None):
        present.add(update.client) if update else None
        if update is None and "cyd" in present:
            present.clear()
            raise torch.linalg.LinAlgError("the algorithm failed to converge")

    failing(federation, when)
    turn = server_turn(federation.job, federation.server, payloads, 1)
    assert set(turn.refused) == {"cyd"} and "converge" in turn.refused["cyd"]


def test_a_failure_in_another_ones_turn_is_not_blamed_on_that_one():
    federation = Federation(job(build("fedit")))
    payloads, present = uploads(federation), set()
    large = {name: dense_entry(to_dense(entry) * 50) for name, entry in decode(payloads["ada"]).entries.items()}
    payloads["ada"] = changed(payloads["ada"], large)

    def when(update: Update | None):
        present.add(update.client) if update else present.clear()
        if {"ada", "bob"} <= present:
            present.clear()
            raise RuntimeError("a running sum has overflowed")

    failing(federation, when)
    assert set(server_turn(federation.job, federation.server, payloads, 1).refused) == {"ada"}


def test_a_round_in_which_everybody_fails_says_whom_it_refused():
    federation = Federation(job(build("fedit")))

    def when(update: Update | None):
        raise ValueError("no")

    failing(federation, when)
    with pytest.raises(RoundError, match="no usable update from 3 clients") as stopped:
        server_turn(federation.job, federation.server, uploads(federation), 1)
    assert set(stopped.value.refused) == {"ada", "bob", "cyd"}


def test_a_round_needs_as_many_updates_as_it_is_told():
    federation = Federation(job(build("fedit")))
    payloads = uploads(federation)
    payloads["cyd"] = payloads["bob"]
    with pytest.raises(RoundError, match="2 usable updates from 3 clients .* 3 needed"):
        server_turn(federation.job, federation.server, payloads, 1, least=3)


@names
@pytest.mark.parametrize("number", [1e30, 3e38, 1e10])
@pytest.mark.parametrize("caps", [True, False])
def test_huge_finite_values_end_no_round_and_leave_a_finite_state(name: str, number: float, caps: bool):
    federation = Federation(job(build(name)))
    payloads = uploads(federation)
    entries = {
        n: Dense(e.shape, torch.full((count(e.shape),), number)) for n, e in decode(payloads["bob"]).entries.items()
    }
    payloads["bob"] = changed(payloads["bob"], entries)
    run = replace(federation.job, caps=USUAL) if caps else federation.job
    turn = server_turn(run, federation.server, payloads, 1)
    assert set(turn.refused) <= {"bob"} and (not caps or turn.refused)
    for tensor in turn.state.total.tensors().values():
        assert torch.isfinite(tensor).all()


# Broadcasts


def broadcast(name: str) -> tuple[Federation, bytes, bytes]:
    """A federation whose clients have not yet heard of round 1; the change, and the full state after it."""
    federation = Federation(job(named(name)))
    federation.play()
    return federation, federation.broadcasts[0], full_state(federation.job, federation.server, 1)


def hostile(payload: bytes, kind: str) -> bytes:
    message = decode(payload)
    name = next(
        n for n in sorted(message.entries) if n.rpartition("/")[2] in ("A", "B", "R", "S", "frozen_A", "frozen_B")
    )
    module, _, part = name.rpartition("/")
    shape = message.entries[name].shape
    empty = Sparse((2**27, 1) if part.endswith("B") else (1, 2**27), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    return {
        "foreign module": lambda: changed(payload, {f"anything.else/{part}": message.entries[name]}),
        "foreign part": lambda: changed(payload, {f"{module}/C": message.entries[name]}),
        "not finite": lambda: changed(payload, {name: Dense(shape, torch.full((count(shape),), float("nan")))}),
        "infinite": lambda: changed(payload, {name: Dense(shape, torch.full((count(shape),), float("inf")))}),
        "scalar": lambda: changed(payload, {name: Dense((), torch.ones(1))}),
        "other width": lambda: changed(payload, {name: dense_entry(torch.ones(3, 3))}),
        "huge": lambda: changed(payload, {name: empty}),
    }[kind]()


@names
@pytest.mark.parametrize("way", ["change", "state"])
@pytest.mark.parametrize(
    "kind", ["foreign module", "foreign part", "not finite", "infinite", "scalar", "other width", "huge"]
)
def test_a_broadcast_that_is_not_of_this_adapter_is_not_taken_up(name: str, way: str, kind: str):
    federation, change, state = broadcast(name)
    payload = hostile(change if way == "change" else state, kind)
    before = federation.clients["ada"]
    held = digest(before.adapter)
    with pytest.raises((WireError, ShapeError, NumericError)):
        accept(federation.job, before, payload)
    assert digest(before.adapter) == held and before.version == 0


@names
def test_a_state_that_lacks_a_module_is_not_taken_up(name: str):
    federation, _, state = broadcast(name)
    message = decode(state)
    less = {n: e for n, e in message.entries.items() if not n.startswith(MODULE)}
    with pytest.raises(ShapeError, match="lacks tensor"):
        accept(federation.job, federation.clients["ada"], encode(Message(message.header, less)))


@names
def test_89_bytes_ask_for_no_gigabytes(name: str):
    federation = Federation(job(build(name)))
    run = replace(federation.job, ranks=federation.ranks, num_rounds=10)
    header = replace(decode(full_state(run, federation.server, 1)).header, base_version=1)
    empty = Sparse((2**27, 1), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    wide = Sparse((1, 2**27), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    payload = encode(Message(header, {f"{MODULE}/A": wide, f"{MODULE}/B": empty}))
    with pytest.raises(WireError, match="elements|more than|values"):
        accept(run, federation.clients["ada"], payload)


@names
def test_what_a_server_really_sends_is_taken_up_where_all_ranks_are_known(name: str):
    cast = {"ada": 4, "bob": 2, "cyd": 1} if build(name).facts.unequal_ranks else {"ada": 4, "bob": 4, "cyd": 4}
    plain = Federation(job(build(name)), cast)
    plain.job = replace(plain.job, ranks=plain.ranks, num_rounds=4)
    newcomers = dict(plain.clients)
    for round in range(4):
        plain.play()
        for state in newcomers.values():
            whole = accept(plain.job, state, full_state(plain.job, plain.server, round))
            assert whole.digest == plain.server.digest
    plain.settle()
    assert all(state.digest == plain.server.digest for state in plain.clients.values())


def test_any_exception_of_a_reader_is_the_updates_fault(monkeypatch):
    federation = Federation(job(build("fedit")))

    def broken(payload, limits):
        raise ZeroDivisionError("integer division by zero")

    payload = uploads(federation)["ada"]
    monkeypatch.setattr("fedloom.rounds.decoded.decode", broken)
    with pytest.raises(FedloomError, match="ZeroDivisionError"):
        check_update(federation.job, federation.server, "ada", payload, 1)
