"""Small payloads: any budget is met to the byte, nothing is lost on the way, and what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.budget import Budget
from fedloom.compress.entries import Dense, Quantized, Sparse, to_dense
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError, WireError
from fedloom.lora.pair import LoraPair, initial_state
from fedloom.methods.method import Context, State, Update
from fedloom.methods.shared.averaging import weighted_mean
from fedloom.methods.table import build
from fedloom.rounds.draft import Draft
from fedloom.rounds.joint import CODES, SCALES, SIGNS, Outline, join_entries, split_entries
from fedloom.rounds.least import check_room, least_bytes
from fedloom.rounds.turns import Job, accept, client_turn, server_turn, start
from fedloom.wire import Header, Message, decode, encode
from toy import step

SHAPES = {f"layers.{number}.{kind}": (24, 40) for number in range(4) for kind in ("k_proj", "q_proj")}
RANKS = dict.fromkeys(SHAPES, 2)
INITIAL = initial_state(SHAPES, RANKS, 0)
OUTLINE = Outline.of(INITIAL, RANKS)
HEADER = Header("update", "loom", 1, 0, "ab" * 16, "cd" * 16, num_examples=1)


def job(budget: int, **settings: object) -> Job:
    method = build("loom", {"upload_share": 0.5, **settings})
    return Job(method, 5, quantize("sign"), budget=Budget(size=budget), num_rounds=4)


def moved(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return INITIAL.map(
        lambda pair: LoraPair(*(t + torch.randn(t.shape, generator=generator) ** 3 for t in (pair.A, pair.B)))
    )


def sent(budget: int, seed: int = 1):
    context = Context(1, 5, quantize("sign"), Budget(size=budget), size=Draft(HEADER, OUTLINE).size)
    return build("loom", {"upload_share": 0.5}).compress(State(INITIAL), moved(seed), context)[1]


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, entry in left.items():
        other = right[name]
        assert entry.shape == other.shape and entry.values.block == other.values.block
        assert torch.equal(entry.positions, other.positions)
        assert torch.equal(entry.values.codes, other.values.codes)
        assert torch.equal(entry.values.scales, other.values.scales)


@settings(max_examples=25)
@given(st.integers(least_bytes(job(1), INITIAL, INITIAL), 1500), st.integers(0, 100))
def test_every_budget_from_the_least_on_is_met_and_what_arrives_is_what_was_kept(budget, seed):
    entries = sent(budget, seed)
    payload = Draft(HEADER, OUTLINE).payload(entries)
    assert len(payload) <= budget
    assert sum(entry.positions.numel() for entry in entries.values()) > 0
    assert_equal(split_entries(decode(payload).entries, State(INITIAL)), entries)


@settings(max_examples=10)
@given(st.integers(least_bytes(job(1), INITIAL, INITIAL), 700), st.integers(0, 100))
def test_what_a_broadcast_leaves_out_waits_to_the_last_bit(budget, seed):
    context = Context(1, 5, quantize("sign"), Budget(size=budget), size=Draft(HEADER, OUTLINE).size)
    updates = [Update("ada", 0.25, sent(400, seed)), Update("bob", 0.75, sent(500, seed + 1))]
    done = build("loom", {"upload_share": 0.5}).aggregate(State(INITIAL), updates, context)
    for name, whole in weighted_mean(updates).items():
        assert torch.equal(done.memory[name], whole - to_dense(done.entries[name]))


@pytest.mark.parametrize("budget", [140, 180, 400, 1200])
def test_rounds_of_small_payloads_lead_all_to_one_state(budget):
    run = job(budget)
    server, clients = start(run, INITIAL), {name: start(run, INITIAL, RANKS) for name in ("ada", "bob")}
    last = []
    for round in (1, 2, 3):
        turns = {name: client_turn(run, name, state, last, step, round) for name, state in clients.items()}
        clients = {name: turn.state for name, turn in turns.items()}
        done = server_turn(run, server, {name: turn.payload for name, turn in turns.items()}, round)
        assert not done.refused
        assert max(len(done.payload), *(len(turn.payload) for turn in turns.values())) <= budget
        server, last = done.state, [done.payload]
    caught_up = accept(run, clients["ada"], last[0])
    assert caught_up.digest == server.digest
    for name, tensor in caught_up.adapter.tensors().items():
        assert torch.equal(tensor, server.adapter.tensors()[name])


def test_a_client_of_lower_rank_is_understood_and_one_of_some_modules_names_its_tensors():
    run, low = job(400), dict.fromkeys(SHAPES, 1)
    turn = client_turn(run, "ada", start(run, INITIAL, low), (), step, 1)
    assert f"{SIGNS.prefix}1" in decode(turn.payload).entries
    done = server_turn(replace(run, ranks={"ada": low}), start(run, INITIAL), {"ada": turn.payload}, 1)
    assert not done.refused
    some = initial_state({"layers.0.k_proj": (24, 40)}, RANKS, 0)
    assert Outline.of(some, RANKS) is None


@pytest.mark.parametrize("budget", [260, 400, 550])
def test_few_codes_of_a_whole_adapter_travel_together_and_arrive_as_they_were(budget: int):
    run = replace(job(budget, broadcast="state", coding="codes"), start=INITIAL, num_rounds=4)
    server, client = start(run, INITIAL), start(run, INITIAL, RANKS)
    for round in (1, 2):
        turn = client_turn(run, "ada", client, [], step, round)
        done = server_turn(run, server, {"ada": turn.payload}, round)
        assert max(len(turn.payload), len(done.payload)) <= budget
        assert f"{CODES.prefix}2" in decode(done.payload).entries
        server, client = done.state, accept(run, turn.state, done.payload)
        for name, tensor in client.adapter.tensors().items():
            assert torch.equal(tensor, server.adapter.tensors()[name])


def joined(**changes: object):
    return {**join_entries(sent(400), OUTLINE), **changes}


SIGNED, SCALED = join_entries(sent(400), OUTLINE).values()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({f"{SIGNS.prefix}2": SIGNED}, "comes with a tensor"),
        (joined(other=SCALED), "comes with a tensor"),
        ({f"{SIGNS.prefix}02": SIGNED, SCALES: SCALED}, "names no rank"),
        ({f"{SIGNS.prefix}0": SIGNED, SCALES: SCALED}, "names no rank"),
        ({f"{SIGNS.prefix}3": SIGNED, SCALES: SCALED}, "larger adapter"),
        ({f"{SIGNS.prefix}1": SIGNED, SCALES: SCALED}, "does not fit an adapter"),
        (joined(scales=Dense(SCALED.shape, SCALED.values.float())), "not dense bf16"),
        (joined(scales=Dense(SCALED.shape, -SCALED.values)), "negative"),
        (joined(scales=Dense(SCALED.shape, SCALED.values / 0)), "infinite"),
        (joined(scales=Dense((3,), SCALED.values[:3])), "do not fit tensors"),
        (
            {
                f"{SIGNS.prefix}2": Sparse(
                    SIGNED.shape, SIGNED.positions, Quantized(SIGNED.values.codes, torch.tensor([2.0]), 65536, 1)
                ),
                SCALES: SCALED,
            },
            "one scale 1",
        ),
        ({f"{CODES.prefix}2": SIGNED, SCALES: SCALED}, "codes of 4 bits"),
    ],
)
def test_joined_codes_that_do_not_fit_together_are_refused(entries, message):
    with pytest.raises(WireError, match=message):
        split_entries(decode(encode(Message(HEADER, entries))).entries, State(INITIAL))


def test_the_bytes_of_a_joined_payload_stay_what_they_are():
    """Two signs of each of two tensors; the six others are not in it."""
    entries = {
        name: Sparse(shape, torch.tensor([], dtype=torch.int64), quantize("sign")(torch.empty(0), 0))
        for name, shape in OUTLINE.shapes.items()
    }
    for name, where, value in (("layers.0.k_proj/A", [3, 79], 0.5), ("layers.2.q_proj/B", [0, 47], -2.0)):
        values = quantize("sign")(torch.full((2,), value), 0)
        entries[name] = Sparse(OUTLINE.shapes[name], torch.tensor(where), values)
    payload = Draft(replace(HEADER, method="loom"), OUTLINE).payload(entries)
    assert payload.hex() == GOLDEN
    assert_equal(split_entries(decode(bytes.fromhex(GOLDEN)).entries, State(INITIAL)), entries)


GOLDEN = (
    "464c4f4d0200046c6f6f6d01000110abababababababababababababababab10cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd3d3d"
    "0200067363616c6573010669676e733a3200010102010501800880800401010401090202020c02020d02021a01011b01011c"
    "01011d01011e010120040403047e800000037f00000003213a1b8cad4769f5b11c13"
)


def test_a_budget_without_room_is_refused_at_the_start_and_says_what_the_least_is():
    least = least_bytes(job(1), INITIAL, INITIAL)
    check_room(job(least), INITIAL, {"ada": RANKS})
    with pytest.raises(ConfigError, match=f"takes {least}: set wire.budget to {least} or more"):
        check_room(job(least - 1), INITIAL, {"ada": RANKS})
    with pytest.raises(ConfigError, match="method.taper"):
        check_room(job(least, taper=0.5), INITIAL, {"ada": RANKS})
    check_room(replace(job(1), budget=None), INITIAL, {"ada": RANKS})
