"""loom against its page: how much it sends, what it sends, and what waits on the server."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.budget import COST, Budget, Room, value_bits
from fedloom.compress.entries import Sparse, dense_entry, floats, to_dense
from fedloom.compress.quantize import quantize
from fedloom.compress.sparsify import importance, kept_count
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraPair, LoraState, from_tensors, initial_state
from fedloom.methods.method import Context, State, Update
from fedloom.methods.shared.dial import Dial
from fedloom.methods.shared.guard import UNDONE
from fedloom.methods.table import build
from fedloom.records.quantities import parse_budget
from fedloom.rounds.draft import Draft
from fedloom.rounds.joint import Outline
from fedloom.rounds.turns import Job, client_turn, server_turn, start
from fedloom.wire import Header, Message, encode
from fedloom.workspace.plan import download_share
from toy import step

SHAPES = {"a.q_proj": (96, 160), "b.down": (160, 240)}
RANKS = dict.fromkeys(SHAPES, 8)
HEADER = Header("update", "loom", 1, 0, "", num_examples=1)


def job(settings: dict[str, object], budget: str = "1%", values: str = "sign") -> Job:
    return Job(build("loom", settings), 5, quantize(values), budget=kept(budget))


def kept(budget: str) -> Budget:
    return Budget(*parse_budget(budget))


def context(values: str = "fp32", budget: str = "1%") -> Context:
    return Context(1, 5, quantize(values), kept(budget), size=Draft(HEADER).size)


def moved(state: LoraState, seed: int) -> LoraState:
    """Heavy-tailed changes of both factors."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return 1e-2 * torch.randn(tensor.shape, generator=generator) ** 3

    return state.map(lambda pair: LoraPair(pair.A + noise(pair.A), pair.B + noise(pair.B)))


@pytest.mark.parametrize("budget", ["2%", "3%", "4%", "450"])
def test_both_ways_stay_within_the_budget_and_use_it(budget):
    run = job({"max_density": 0.5}, budget)
    adapter = initial_state(SHAPES, RANKS, 0)
    server = start(run, adapter)
    clients = {name: start(run, adapter, RANKS) for name in ("ada", "bob", "cyd")}
    both = float(budget[:-1]) / 100 * 8 * adapter.numel() if budget.endswith("%") else 2 * int(budget)
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
    _, entries = build("loom", {"step": 2.5}).compress(state, after, context(budget="40%"))
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


def slow_entry(before, after, other, part, density, step, given, weighed):
    """What loom sends of one factor, by sorting everything."""
    change = after - before
    scores = (importance(change, other, part) if weighed else change.abs()).flatten().tolist()
    ranked = [i for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)) if scores[i] > 0]
    where = torch.tensor(sorted(ranked[: kept_count(len(scores), density)]), dtype=torch.int64)
    kept = change.flatten()[where]
    if where.numel():
        l1, l2 = change.abs().sum().item() / len(where), step * change.norm().item() / math.sqrt(len(where))
        kept = kept * (min(l1, l2) / kept.abs().mean().item())
    return Sparse(tuple(change.shape), where, given.quantize(kept, 0))


@pytest.mark.parametrize("taper", [0.0, 0.4, 1.0])
def test_the_bytes_of_the_rounds_fall_in_a_line_and_their_mean_is_the_budget(taper):
    dial, given = Dial(0.5, 1.0, taper), context(budget="5000")
    adapter = initial_state(SHAPES, RANKS, 0)
    sizes = [dial.bytes(adapter, "up", replace(given, round=round, num_rounds=10)) for round in range(1, 11)]
    assert sum(sizes) == pytest.approx(10 * 5000, abs=10)
    assert sizes == [pytest.approx(5000 * (1 + taper * (1 - (round - 0.5) / 5)), abs=1) for round in range(1, 11)]
    unknown = [dial.bytes(adapter, "up", replace(given, round=round)) for round in (1, 9)]
    assert unknown == [5000, 5000]


def test_a_broadcast_is_the_smaller_the_more_of_them_a_client_misses():
    dial, adapter, given = Dial(0.4, 1.0, 0.0), initial_state(SHAPES, RANKS, 0), context(budget="5000")
    assert dial.bytes(adapter, "down", given) == 6000
    assert dial.bytes(adapter, "down", replace(given, downloads=7.5)) == 800
    assert dial.bytes(adapter, "up", replace(given, downloads=7.5)) == 4000


def test_downloads_count_missed_broadcasts_and_what_a_client_has_no_rank_for():
    """Four clients of rank 8, four of rank 2, two of eight a round: 4 broadcasts a turn, of 8 / 5 of what they hold."""
    adapter = initial_state(SHAPES, RANKS, 0)
    clients = {f"c{i}": dict.fromkeys(SHAPES, 8 if i < 4 else 2) for i in range(8)}
    assert download_share(adapter, clients, 8) == pytest.approx(8 / 5)
    assert download_share(adapter, clients, 2) == pytest.approx(4 * 8 / 5)
    assert download_share(adapter, {"c0": clients["c0"]}, 1) == 1


@pytest.mark.parametrize("bits", [0.0, 1e-4, 0.05, 0.4, 1.2, 50.0])
def test_the_affordable_density_is_the_largest_that_the_bits_pay_for(bits):
    room = Room(0, 1, 1, 1.0, most=0.4)
    found = room.density(bits)
    grid = [density / 10_000 for density in range(4001) if room.bits(density / 10_000) <= bits]
    assert found == pytest.approx(max(grid), abs=1.01e-4)


def slow_compress(budget, most, step, state, after, given, weighed):
    """(cost, entries) of loom's page, every trial from the very beginning."""

    def at(density):
        entries = {}
        for module, now in after.items():
            before = state.adapter[module]
            entries[f"{module}/A"] = slow_entry(before.A, now.A, now.B, "A", density, step, given, weighed)
            entries[f"{module}/B"] = slow_entry(before.B, now.B, before.A, "B", density, step, given, weighed)
        return entries

    total, room = state.adapter.numel(), Room(budget, 1, 1, value_bits(given.quantize), most)
    cost = state.memory[COST].item() if COST in state.memory else 1.0
    best, taken = at(0.0), 0
    least = given.size(best)
    for _ in range(5):
        density = room.density(8 * max(0.99 * budget - least, 0) / total / cost)
        entries = at(density)
        size = given.size(entries)
        cost = max(8 * (size - least) / total / max(room.bits(density), 1e-9), 0.1)
        if taken < size <= budget:
            best, taken = entries, size
        if taken > 0.95 * budget or (taken == size and density == most):
            break
    return cost, best


@settings(max_examples=40)
@given(
    st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1),
    st.integers(1, 6),
    st.integers(0, 1000),
    st.sampled_from([0, 200, 400, 900, 10_000]),
    st.sampled_from([None, 0.3, 1.0, 4.0]),
    st.sampled_from(["sign", "fp32"]),
    st.booleans(),
)
def test_the_entries_are_bit_by_bit_those_of_a_slow_twin(shapes, rank, seed, budget, cost, values, weighed):
    """Changes are rounded to few values, so that there are ties and zeros; a wrong remembered cost asks for trials."""
    start_ = moved(initial_state(shapes, dict.fromkeys(shapes, rank), seed), seed)
    state = State(start_, memory={} if cost is None else {COST: torch.tensor(cost)})
    generator = torch.Generator().manual_seed(seed)
    after = state.adapter.map(
        lambda pair: LoraPair(*(t + torch.randint(-2, 3, t.shape, generator=generator) / 64 for t in (pair.A, pair.B)))
    )
    given_ = context(values, str(max(budget // 2, 1)))
    chosen = {"upload_share": 1.0, "max_density": 0.4, "importance": weighed}
    method = build("loom", chosen)
    for _ in range(2):  # the second time with all that is remembered
        memory, entries = method.compress(state, after, given_)
        expected_cost, expected = slow_compress(budget or 2, 0.4, 3.0, state, after, given_, weighed)
        assert memory[COST].item() == pytest.approx(expected_cost, rel=1e-6)
        assert entries.keys() == expected.keys()
        crowded = given_.size(expected) > (budget or 2)
        assert not crowded or sum(entry.positions.numel() for entry in entries.values()) <= len(entries)
        for name, entry in entries.items():
            if crowded and not entry.positions.numel():
                continue
            assert torch.equal(entry.positions, expected[name].positions)
            assert torch.equal(floats(entry.values), floats(expected[name].values))
        state = replace(state, memory=memory)


def test_a_turn_sends_the_payload_that_was_measured_last(monkeypatch):
    encoded = []
    monkeypatch.setattr(
        "fedloom.rounds.draft.encode", lambda message, folder=None: encoded.append(message) or encode(message)
    )
    run, adapter = job({"max_density": 0.5}, "3%"), initial_state(SHAPES, RANKS, 0)
    turn = client_turn(run, "ada", start(run, adapter, RANKS), (), step, 1)
    encoded.clear()
    later = client_turn(run, "ada", turn.state, (), step, 2)
    assert len(encoded) == 1, "what a payload takes is known from the first turn"
    assert later.payload == encode(encoded[-1])


def test_a_draft_encodes_anew_what_is_not_the_same():
    state = State(moved(initial_state(SHAPES, RANKS, 1), 1))
    sent, other = (build("loom", {}).compress(state, moved(state.adapter, seed), context())[1] for seed in (2, 3))
    draft = Draft(HEADER)
    assert draft.payload({}) == encode(Message(HEADER, {}))
    first = draft.payload(sent)
    assert draft.payload(dict(sent)) is first
    assert draft.payload({**sent, "a.q_proj/A": other["a.q_proj/A"]}) != first == draft.payload(sent)


def test_what_a_broadcast_leaves_out_joins_the_next_one():
    method, given = build("loom", {"upload_share": 0.7, "server_residual": 0.5}), context(budget="40%")
    server = State(moved(initial_state(SHAPES, RANKS, 2), 1))
    sent, other = (method.compress(server, moved(server.adapter, seed), given)[1] for seed in (2, 3))
    first = method.aggregate(server, [Update("ada", 0.25, sent), Update("bob", 0.75, other)], given)
    for name, entry in first.entries.items():
        left = 0.25 * to_dense(sent[name]) + 0.75 * to_dense(other[name]) - to_dense(entry)
        assert left.count_nonzero() > 0
        torch.testing.assert_close(first.memory[name], left)
    silent = {name: replace(entry, values=torch.zeros_like(floats(entry.values))) for name, entry in sent.items()}
    second = method.aggregate(replace(server, memory=first.memory), [Update("ada", 1.0, silent)], given)
    for name, entry in second.entries.items():
        expected = 0.5 * first.memory[name].flatten()[entry.positions]
        torch.testing.assert_close(floats(entry.values), expected)


def test_the_broadcast_too_judges_by_magnitude_where_it_is_asked_to():
    method = build("loom", {"importance": False})
    server = State(moved(initial_state(SHAPES, RANKS, 2), 1))
    sent = build("loom").compress(server, moved(server.adapter, 2), context(budget="900%"))[1]
    for name, entry in method.aggregate(server, [Update("ada", 1.0, sent)], context(budget="40%")).entries.items():
        left = to_dense(sent[name]).abs().flatten()
        least = left[entry.positions].min()
        left[entry.positions] = 0.0
        assert 0.0 < left.max() <= least


def test_a_budget_is_a_ceiling():
    state = State(initial_state(SHAPES, RANKS, 1))
    for density in (0.1, 1.0):
        method = build("loom", {"max_density": density})
        entries = method.compress(state, moved(state.adapter, 3), context(budget="900%"))[1]
        for entry in entries.values():
            # B is zero before the first round, but what A multiplies is B after it: only what is unchanged scores zero.
            assert 0.99 * density < entry.positions.numel() / torch.Size(entry.shape).numel() < 1.01 * density


@pytest.mark.parametrize(("budget", "advised"), [("1%", False), ("0.3%", True), ("75", True), ("20000", False)])
def test_few_bits_for_many_elements_are_pointed_out(budget, advised):
    """1 % both ways is 0.64 bits an element, of which 0.27 go up and 0.37 down, or 0.09 where it is four broadcasts."""
    method, adapter, given = build("loom", {"taper": 1.0}), initial_state(SHAPES, RANKS, 0), context(budget=budget)
    text = method.advise(adapter, given)
    assert bool(text) == advised and ("lora.r" in text) == advised
    rare = method.advise(adapter, replace(given, downloads=4.0))
    assert ("bits" in rare) == ("'state', with 4 broadcasts a turn" in rare) == (budget != "20000")


@pytest.mark.parametrize("budget", ["1%", "3%", "180", "400"])
def test_a_step_that_is_taken_back_keeps_to_the_bytes_of_its_round(budget):
    """With `taper` the step may have had more of them; what has no place goes with later broadcasts."""
    method, state = build("loom", {"taper": 1.0}), State(initial_state(SHAPES, RANKS, 1))
    outline = Outline.of(state.adapter, RANKS)
    first_round = replace(context("sign", budget), num_rounds=2, size=Draft(HEADER, outline).size)
    second_round = replace(first_round, round=2)
    wanted, held = moved(state.adapter, 3).tensors(), state.adapter.tensors()
    change = {name: dense_entry(tensor - held[name]) for name, tensor in wanted.items()}
    first = method.aggregate(state, [Update("ada", 1.0, change)], first_round)
    step = {name: to_dense(entry) for name, entry in first.entries.items()}
    stepped = State(from_tensors({name: held[name] + step[name] for name in held}), memory=first.memory)
    undone = Update("ada", 1.0, {name: dense_entry(-tensor) for name, tensor in step.items()})
    second = method.aggregate(stepped, [undone], second_round)
    assert UNDONE in second.stats
    room = Dial(0.42, 1.0, 1.0).bytes(state.adapter, "down", second_round)
    assert 0 < second_round.size(second.entries) <= room < first_round.size(first.entries)
    for name, moved_by in step.items():
        sent = to_dense(second.entries[name]) if name in second.entries else torch.zeros_like(moved_by)
        waits = second.memory[name] - first.memory[name]
        assert torch.allclose(sent + waits, -moved_by, atol=1e-6)


def test_no_room_still_sends_one_element():
    state = State(initial_state(SHAPES, RANKS, 1))
    entries = build("loom").compress(state, moved(state.adapter, 3), context(budget="1"))[1]
    assert sum(entry.positions.numel() for entry in entries.values()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "1%"}, "method.budget is not a setting: use wire.budget"),
        ({"upload_share": 0.0}, "method.upload_share is 0.0"),
        ({"max_density": 1.5}, "method.max_density is 1.5"),
        ({"step": 0.0}, "step is 0.0"),
        ({"server_residual": 1.1}, "server_residual is 1.1"),
        ({"taper": -1.0}, "taper is -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build("loom", settings)


@pytest.mark.parametrize(
    ("budget", "form"), [("0.3%", "sign"), ("4%", "sign"), ("7%", "int4"), ("20%", "int8"), ("5000", "sign")]
)
def test_the_bits_of_a_value_follow_from_the_budget(budget, form):
    assert build("loom").form(kept(budget)) == form


def test_without_a_budget_one_percent_is_kept_to():
    run, adapter = Job(build("loom"), 5, quantize("sign")), initial_state(SHAPES, RANKS, 0)
    payloads = [client_turn(one, "a", start(one, adapter), (), step, 1).payload for one in (run, job({}))]
    assert payloads[0] == payloads[1] and build("loom").form() == "sign"
