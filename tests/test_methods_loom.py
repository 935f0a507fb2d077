"""loom against its page: how much it sends, what it sends, and what waits on the server."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from fedloom.errors import ConfigError
from fedloom.lora import LoraPair, LoraState, initial_state
from fedloom.method import Context, State, Update
from fedloom.methods import build
from fedloom.rounds import Job, client_turn, payload_bytes, server_turn, start
from fedloom.tensors import floats, to_dense
from fedloom.wire import Header, quantize
from toy import step

SHAPES = {"a.q_proj": (96, 160), "b.down": (160, 240)}
RANKS = dict.fromkeys(SHAPES, 8)
HEADER = Header("update", "loom", 1, 0, "", num_examples=1)


def job(settings: dict[str, object], values: str = "sign") -> Job:
    return Job(build("loom", settings), 5, lambda tensor, seed: quantize(tensor, values, seed))


def context(values: str = "fp32") -> Context:
    return Context(1, 5, lambda tensor, seed: quantize(tensor, values, seed), size=partial(payload_bytes, HEADER))


def moved(state: LoraState, seed: int) -> LoraState:
    """Heavy-tailed changes of both factors."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return 1e-2 * torch.randn(tensor.shape, generator=generator) ** 3

    return state.map(lambda pair: LoraPair(pair.A + noise(pair.A), pair.B + noise(pair.B)))


@pytest.mark.parametrize("budget", ["2%", "3%", "4%", 900])
def test_both_ways_stay_within_the_budget_and_use_it(budget):
    run = job({"budget": budget, "max_density": 0.5})
    adapter = initial_state(SHAPES, RANKS, 0)
    server = start(run, adapter)
    clients = {name: start(run, adapter, RANKS) for name in ("ada", "bob", "cyd")}
    both = budget if isinstance(budget, int) else float(budget[:-1]) / 100 * 8 * adapter.numel()
    broadcasts: list[bytes] = []
    for round in (1, 2, 3):
        payloads = {}
        for name, state in clients.items():
            turn = client_turn(run, name, state, broadcasts[-1:], step, round)
            clients[name], payloads[name] = turn.state, turn.payload
            assert 0.9 * 0.42 * both < len(turn.payload) <= 0.42 * both
        done = server_turn(run, server, payloads, round)
        server = done.state
        broadcasts.append(done.payload)
        assert 0.9 * 0.58 * both < len(done.payload) <= 0.58 * both


def test_what_is_sent_is_what_a_slow_twin_picks():
    state = State(initial_state(SHAPES, RANKS, 1).map(lambda pair: LoraPair(pair.A, torch.ones_like(pair.B))))
    after = moved(state.adapter, 3)
    _, entries = build("loom", {"budget": "40%", "step": 2.5}).compress(state, after, context())
    density = max(entry.positions.numel() / torch.Size(entry.shape).numel() for entry in entries.values())
    for name, entry in entries.items():
        module, part = name.split("/")
        change = (after[module].part(part) - state.adapter[module].part(part)).double()
        other = after[module].B if part == "A" else state.adapter[module].A
        norms = other.double().norm(dim=0 if part == "A" else 1)
        scores = (change.abs() * (norms[:, None] if part == "A" else norms)).flatten().tolist()
        keep = entry.positions.numel()
        assert keep == pytest.approx(density * len(scores), abs=1)
        assert entry.positions.tolist() == sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:keep])
        kept = change.flatten()[entry.positions]
        mean = min(change.abs().sum() / keep, 2.5 * change.norm() / math.sqrt(keep))
        assert floats(entry.values).double() == pytest.approx(kept * (mean / kept.abs().mean()), rel=1e-5)


def test_what_a_broadcast_leaves_out_joins_the_next_one():
    method = build("loom", {"budget": "40%", "upload_share": 0.7, "server_residual": 0.5})
    server = State(moved(initial_state(SHAPES, RANKS, 2), 1))
    sent, other = (method.compress(server, moved(server.adapter, seed), context())[1] for seed in (2, 3))
    first = method.aggregate(server, [Update("ada", 0.25, sent), Update("bob", 0.75, other)], context())
    for name, entry in first.entries.items():
        left = 0.25 * to_dense(sent[name]) + 0.75 * to_dense(other[name]) - to_dense(entry)
        assert left.count_nonzero() > 0
        torch.testing.assert_close(first.memory[name], left)
    silent = {name: replace(entry, values=torch.zeros_like(floats(entry.values))) for name, entry in sent.items()}
    second = method.aggregate(replace(server, memory=first.memory), [Update("ada", 1.0, silent)], context())
    for name, entry in second.entries.items():
        expected = 0.5 * first.memory[name].flatten()[entry.positions]
        torch.testing.assert_close(floats(entry.values), expected)


def test_a_budget_is_a_ceiling():
    state = State(initial_state(SHAPES, RANKS, 1))
    for density in (0.1, 1.0):
        method = build("loom", {"budget": "900%", "max_density": density})
        entries = method.compress(state, moved(state.adapter, 3), context())[1]
        for entry in entries.values():
            # B is zero before the first round, but what A multiplies is B after it: only what is unchanged scores zero.
            assert 0.99 * density < entry.positions.numel() / torch.Size(entry.shape).numel() < 1.01 * density


def test_no_room_still_sends_one_element_of_every_tensor():
    state = State(initial_state(SHAPES, RANKS, 1))
    entries = build("loom", {"budget": 1}).compress(state, moved(state.adapter, 3), context())[1]
    assert [entry.positions.numel() for entry in entries.values()] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "much"}, "method.budget is 'much': expected a share"),
        ({"budget": "-1%"}, "method.budget"),
        ({"budget": "nan%"}, "method.budget"),
        ({"budget": 0}, "method.budget"),
        ({"upload_share": 0.0}, "method.upload_share is 0.0"),
        ({"max_density": 1.5}, "method.max_density is 1.5"),
        ({"step": 0.0}, "step 0.0"),
        ({"server_residual": 1.1}, "server_residual 1.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build("loom", settings)
