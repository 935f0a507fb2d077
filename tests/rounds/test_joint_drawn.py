"""Positions that both sides draw: none is sent, what clients send adds up, and what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedloom.compress.budget import Budget
from fedloom.compress.entries import Dense, Quantized, Seeded, dense_entry, to_dense
from fedloom.compress.masks import seeded_mask
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError, WireError
from fedloom.lora.pair import LoraPair, initial_state
from fedloom.methods.method import State, Update
from fedloom.methods.shared.drawn import drawn_seed
from fedloom.methods.table import build
from fedloom.rounds.draft import Draft
from fedloom.rounds.joint import Outline, join_entries, split_entries
from fedloom.rounds.joint_drawn import DRAWN, SCALES
from fedloom.rounds.turns import Job, accept, client_turn, server_turn, start
from fedloom.wire import Header, Message, decode, encode
from toy import step

SHAPES = {f"layers.{number}.{kind}": (24, 40) for number in range(4) for kind in ("k_proj", "q_proj")}
RANKS = dict.fromkeys(SHAPES, 2)
INITIAL = initial_state(SHAPES, RANKS, 0)
BASE = "ab" * 16
HEADER = Header("update", "loom", 1, 0, BASE, "cd" * 16, num_examples=1)
OUTLINE = Outline.of(INITIAL, RANKS, BASE)


def job(budget: int, **settings: object) -> Job:
    method = build("loom", {"upload_share": 0.5, "positions": "shared", **settings})
    return Job(method, 5, quantize("sign"), budget=Budget(size=budget), num_rounds=4)


def turns(run: Job, names=("ada", "bob"), initial=INITIAL):
    return {name: client_turn(run, name, start(run, initial, initial.ranks()), (), step, 1) for name in names}


def signs(share: float = 0.25) -> dict[str, Seeded]:
    found = {}
    for k, (name, shape) in enumerate(OUTLINE.shapes.items()):
        mask = seeded_mask(shape[0] * shape[1], share, drawn_seed(BASE, name))
        values = (torch.arange(int(mask.sum())) % 2 * 2 - 1) * (k + 1) / 4
        found[name] = Seeded(shape, drawn_seed(BASE, name), share, quantize("sign")(values, 0))
    return found


def test_an_update_says_no_position_and_so_has_several_times_the_signs():
    sent = {}
    for kind in ("own", "shared"):
        payload = turns(job(200, positions=kind), ["ada"])["ada"].payload
        assert len(payload) <= 200
        sent[kind] = sum(entry.values.numel() for name, entry in decode(payload).entries.items() if name != SCALES)
    assert sent["shared"] > 2 * sent["own"]


def test_all_clients_of_a_version_send_the_same_elements_and_those_of_another_version_others():
    run = job(400)
    for name, payload in ((n, t.payload) for n, t in turns(run).items()):
        held = split_entries(decode(payload).entries, State(INITIAL), start(run, INITIAL).digest)
        for tensor, entry in held.items():
            assert entry.seed == drawn_seed(start(run, INITIAL).digest, tensor), name
            assert entry.seed != drawn_seed(BASE, tensor)
            outside = ~seeded_mask(entry.shape[0] * entry.shape[1], entry.density, entry.seed)
            assert not to_dense(entry).flatten()[outside].any()


def test_what_clients_send_adds_up_to_what_the_server_needs():
    """`Method.adds`: the sum over clients in the place of their updates gives the same broadcast and memory."""

    run, server = job(400), start(job(400), INITIAL)
    updates = [
        Update(name, 0.5, split_entries(decode(turn.payload).entries, server, server.digest))
        for name, turn in turns(run).items()
    ]
    added = {}
    for update in updates:
        for name, tensor in run.method.adds(update.entries, server.adapter).items():
            added[name] = added.get(name, 0) + update.weight * tensor
    size = Draft(HEADER, OUTLINE).size
    context = replace(run.context(1), size=size)
    flat = run.method.aggregate(server, updates, context)
    summed = run.method.aggregate(server, [Update("sum", 1.0, {n: dense_entry(t) for n, t in added.items()})], context)
    for name, entry in flat.entries.items():
        assert torch.equal(to_dense(entry), to_dense(summed.entries[name]))
        assert torch.equal(flat.memory[name], summed.memory[name])


@pytest.mark.parametrize("budget", [300, 700, 3000])
def test_rounds_at_drawn_positions_lead_all_to_one_state(budget):
    run = job(budget)
    server, clients, last = start(run, INITIAL), {n: start(run, INITIAL, RANKS) for n in ("ada", "bob")}, []
    for round in (1, 2, 3):
        done = {name: client_turn(run, name, state, last, step, round) for name, state in clients.items()}
        clients = {name: turn.state for name, turn in done.items()}
        assert all(any(n.startswith(DRAWN) for n in decode(turn.payload).entries) for turn in done.values())
        turn = server_turn(run, server, {name: one.payload for name, one in done.items()}, round)
        assert not turn.refused
        server, last = turn.state, [turn.payload]
    held = accept(run, clients["ada"], last[0])
    assert held.digest == server.digest
    for name, tensor in held.adapter.tensors().items():
        assert torch.equal(tensor, server.adapter.tensors()[name])


def test_what_may_be_sent_is_known_beforehand_and_all_that_is_sent_is_of_it():
    run = job(400)
    server = start(run, INITIAL)
    places = run.method.support(server, run.context(1))
    for turn in turns(run).values():
        held = split_entries(decode(turn.payload).entries, server, server.digest)
        assert 0 < sum(entry.values.numel() for entry in held.values()) <= sum(p.numel() for p in places.values())
        for name, entry in held.items():
            assert set(to_dense(entry).flatten().nonzero().flatten().tolist()) <= set(places[name].tolist())
    assert sum(p.numel() for p in places.values()) < 1.2 * sum(entry.values.numel() for entry in held.values())


def test_large_tensors_travel_one_by_one():
    wide = initial_state({"q_proj": (900, 700)}, {"q_proj": 2}, 0)
    payload = turns(job(3000), ["ada"], wide)["ada"].payload
    assert set(decode(payload).entries) == {"q_proj/A", "q_proj/B"}
    assert not server_turn(job(3000), start(job(3000), wide), {"ada": payload}, 1).refused


def test_shared_positions_do_not_go_with_whole_states():
    with pytest.raises(ConfigError, match="method.positions"):
        job(400, broadcast="state")


def test_the_mean_magnitude_of_what_is_sent_is_that_of_the_whole_change():
    run = job(400, step=1000.0)
    turn = turns(run, ["ada"])["ada"]
    held = split_entries(decode(turn.payload).entries, State(INITIAL), start(run, INITIAL).digest)
    for name, tensor in turn.trained.adapter.tensors().items():
        change, sent = tensor - INITIAL.tensors()[name], to_dense(held[name])
        assert float(sent.abs().sum()) == pytest.approx(float(change.abs().sum()), rel=0.01)


SHARE = 16384
SIGNED, SCALED = join_entries(signs(), OUTLINE).values()
FLOATS = Dense(SIGNED.shape, torch.ones(SIGNED.values.numel()))
SCALED_TWICE = Dense(SIGNED.shape, Quantized(SIGNED.values.codes, torch.tensor([2.0]), 65536, 1))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({f"{DRAWN}2:{SHARE}": SIGNED}, "comes with a tensor"),
        ({f"{DRAWN}2:{SHARE}": SIGNED, SCALES: SCALED, "other": SCALED}, "comes with a tensor"),
        ({f"{DRAWN}2": SIGNED, SCALES: SCALED}, "names no share"),
        ({f"{DRAWN}2:0{SHARE}": SIGNED, SCALES: SCALED}, "names no share"),
        ({f"{DRAWN}2:0": SIGNED, SCALES: SCALED}, "does not fit"),
        ({f"{DRAWN}2:70000": SIGNED, SCALES: SCALED}, "share above"),
        ({f"{DRAWN}2:999999": SIGNED, SCALES: SCALED}, "names no share"),
        ({f"{DRAWN}:{SHARE}": SIGNED, SCALES: SCALED}, "names no rank"),
        ({f"{DRAWN}3:{SHARE}": SIGNED, SCALES: SCALED}, "larger adapter"),
        ({f"{DRAWN}1:{SHARE}": SIGNED, SCALES: SCALED}, "does not fit"),
        ({f"{DRAWN}2:{SHARE + 9000}": SIGNED, SCALES: SCALED}, "does not fit"),
        ({f"{DRAWN}2:{SHARE}": FLOATS, SCALES: SCALED}, "codes of 1 bits"),
        ({f"{DRAWN}2:{SHARE}": SCALED_TWICE, SCALES: SCALED}, "one scale 1"),
        ({f"{DRAWN}2:{SHARE}": SIGNED, SCALES: Dense(SCALED.shape, -SCALED.values)}, "negative"),
        ({f"{DRAWN}2:{SHARE}": SIGNED, SCALES: Dense((3,), SCALED.values[:3])}, "do not fit tensors"),
    ],
)
def test_drawn_signs_that_do_not_fit_are_refused(entries, message):
    with pytest.raises(WireError, match=message):
        split_entries(decode(encode(Message(HEADER, entries))).entries, State(INITIAL), BASE)


def test_the_bytes_of_drawn_signs_stay_what_they_are():
    small = initial_state({"k": (6, 10), "q": (4, 10)}, {"k": 1, "q": 1}, 0)
    outline = Outline.of(small, small.ranks(), BASE)
    entries = {}
    for name, shape in outline.shapes.items():
        mask = seeded_mask(shape[0] * shape[1], 0.5, drawn_seed(BASE, name))
        values = (torch.arange(int(mask.sum())) % 2 * 2 - 1) / 4
        entries[name] = Seeded(shape, drawn_seed(BASE, name), 0.5, quantize("sign")(values, 0))
    payload = Draft(HEADER, outline).payload(entries)
    assert payload.hex() == GOLDEN
    back = split_entries(decode(bytes.fromhex(GOLDEN)).entries, State(small), BASE)
    for name, entry in entries.items():
        assert (back[name].seed, back[name].density, back[name].shape) == (entry.seed, entry.density, entry.shape)
        assert torch.equal(to_dense(back[name]), to_dense(entry))


def test_a_change_of_the_whole_adapter_has_every_element():
    whole = INITIAL.map(lambda pair: LoraPair(torch.ones_like(pair.A), torch.ones_like(pair.B)))
    run = job(4000)
    turn = client_turn(
        run, "ada", start(run, INITIAL, RANKS), (), lambda s, r, k: replace(step(s, r, k), adapter=whole), 1
    )
    held = split_entries(decode(turn.payload).entries, State(INITIAL), start(run, INITIAL).digest)
    assert all(entry.density == 1.0 and to_dense(entry).all() for entry in held.values())


GOLDEN = (
    "464c4f4d0200046c6f6f6d01000110abababababababababababababababab10cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd3939"
    "02000d647261776e3a313a333237363800067363616c65730005010b80800400010103070c03030d03031a02021b01011c01"
    "011d01011e01017d7d7d0000004a057f00000007cdc240ac7424bd"
)
