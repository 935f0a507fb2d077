"""One budget for all methods that choose how much they send: it is kept, nearly used up, and spent where it counts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.budget import COST, LEAST, Budget, Room, fill_budget
from fedloom.compress.entries import Sparse, floats
from fedloom.compress.quantize import quantize
from fedloom.compress.sparsify import counts_by_importance
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraPair, LoraState, initial_state
from fedloom.methods.method import Context, State
from fedloom.methods.table import METHODS, build
from fedloom.records.config import Config
from fedloom.records.configfile import merge_trees, override, parse
from fedloom.records.quantities import parse_budget
from fedloom.rounds.draft import Draft
from fedloom.wire import Header, Message, encode

SHAPES = {"a.q_proj": (96, 160), "b.down": (160, 240)}
HEADER = Header("update", "any", 1, 0, "", num_examples=1)
SPARSE = sorted({name for name in METHODS if build(name).takes_budget} - {"lora-xs"})  # its own: tests/methods


def turn(name, budget, values="int8", seed=0, uneven=1.0):
    """What a client sends of a heavy-tailed change: the payload's size, and its entries."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor, size):
        return size * torch.randn(tensor.shape, generator=generator) ** 3

    before = initial_state(SHAPES, dict.fromkeys(SHAPES, 8), 0)
    sizes = dict(zip(SHAPES, (1.0, uneven), strict=True))
    after = LoraState({m: LoraPair(p.A + noise(p.A, sizes[m]), p.B + noise(p.B, sizes[m])) for m, p in before.items()})
    context = Context(1, 5, quantize(values), Budget(*parse_budget(budget)), size=Draft(HEADER).size)
    memory, entries = build(name).compress(State(before), after, context)
    return len(encode(Message(HEADER, entries))), entries, memory


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("budget", ["900", "4%", "0.7KB"])
def test_any_sparse_method_keeps_to_bytes_or_to_a_share(name, budget):
    share, size = parse_budget(budget)
    most = size or share * 4 * sum(8 * (m + n) for m, n in SHAPES.values())
    most *= 0.84 if name == "loom" else 1.0  # its budget is for both ways, of which 42 % go up
    used, _, memory = turn(name, budget, values="sign" if name == "loom" else "int4")
    assert 0.9 * most < used <= most
    assert {COST, LEAST} <= set(memory)


def test_all_sparse_methods_are_among_them():
    assert {"fed-dare", "fedsrd", "fedsrd-e", "ferret", "flasc", "loom", "sparseloco"} == set(SPARSE)


@settings(max_examples=25)
@given(st.integers(350, 20_000), st.integers(0, 1000), st.sampled_from(["int4", "int8", "fp32"]))
def test_any_budget_is_kept(budget, seed, values):
    assert turn("fedsrd", str(budget), values, seed)[0] <= budget


def test_bytes_go_where_they_save_error():
    _, entries, _ = turn("fedsrd", "1500", uneven=0.01)
    sent = {module: sum(entries[f"{module}/{part}"].values.numel() for part in "AB") for module in SHAPES}
    assert sent["a.q_proj"] > 20 * sent["b.down"]


@pytest.mark.parametrize("name", [name for name in SPARSE if name != "loom"])
def test_a_budget_for_nothing_is_refused(name):
    with pytest.raises(
        ConfigError,
        match=r"wire\.budget allows 50 bytes for a payload .* takes \d+ at the least, since it has 4 tensors",
    ):
        turn(name, "50")


@given(st.lists(st.lists(st.floats(0, 4, width=16), max_size=30), max_size=4), st.floats(0, 1))
def test_one_threshold_counts_the_most_important_of_all(rows, density):
    scores = {str(number): torch.tensor(row, dtype=torch.float32) for number, row in enumerate(rows)}
    counts = counts_by_importance(lambda look: {name: look(one) for name, one in scores.items()})(density)
    every = sorted((value for row in rows for value in row), reverse=True)
    keep = round(density * len(every))
    least = every[keep - 1] if keep else math.inf
    assert counts == {name: sum(value >= least and value > 0 for value in row.tolist()) for name, row in scores.items()}


def test_zeros_are_never_sent_however_large_the_budget():
    before = initial_state(SHAPES, dict.fromkeys(SHAPES, 8), 0)
    context = Context(1, 5, quantize("fp32"), Budget(size=10**6), size=Draft(HEADER).size)
    entries = build("fedsrd").compress(State(before), before, context)[1]
    assert all(entry.values.numel() == 0 for entry in entries.values())


def test_what_a_seed_places_costs_no_bits():
    free, paid = (Room(1000, 8000, 4, 1.0, positions=positions) for positions in (False, True))
    assert free.density(0.25) == pytest.approx(0.25)
    assert paid.density(0.25) < 0.05 and paid.bits(paid.density(0.25)) == pytest.approx(0.25, rel=1e-6)


def test_the_largest_payload_that_fits_wins_whatever_the_entropy_promises():
    """Payloads of three times the estimate: the first try is too large, and the correction finds the room."""
    room = Room(3000, 10_000, 2, 8.0)
    tried = []

    def entries_at(density):
        tried.append(density)
        number = round(density * 10_000)
        return {"m": Sparse((10_000,), torch.arange(number), torch.zeros(number))}

    def size_of(entries):
        return 20 + round(3 * 10_000 * room.bits(floats(entries["m"].values).numel() / 10_000) / 8)

    done = fill_budget(room, entries_at, size_of, {})
    assert 0.95 * 3000 < done.size <= 3000 and done.size == size_of(done.entries)
    count = len(tried)
    again = fill_budget(room, entries_at, size_of, done.memory)
    assert len(tried) == count + 1, "what a payload takes is remembered"
    assert 0.95 * 3000 < again.size <= 3000


@pytest.mark.parametrize("factor", [0.97, 3.0])
def test_what_a_payload_took_is_remembered_whether_or_not_it_fitted_at_once(factor):
    """Payloads of 0.97 times the estimate fit at once; the next ones come nearer to what is aimed at, 0.99."""
    room = Room(3000, 10_000, 2, 8.0)

    def entries_at(density):
        number = round(density * 10_000)
        return {"m": Sparse((10_000,), torch.arange(number), torch.zeros(number))}

    def size_of(entries):
        return round(factor * 10_000 * room.bits(floats(entries["m"].values).numel() / 10_000) / 8)

    memory = fill_budget(room, entries_at, size_of, {}).memory
    assert memory[COST].item() == pytest.approx(factor, rel=2e-3)
    assert fill_budget(room, entries_at, size_of, memory).size == pytest.approx(0.99 * 3000, rel=2e-3)


@pytest.mark.parametrize(
    ("text", "meant"), [("1%", (0.01, 0)), ("0.25 %", (0.0025, 0)), ("8MiB", (0.0, 2**23)), ("1200", (0.0, 1200))]
)
def test_a_budget_is_bytes_or_a_share(text, meant):
    assert parse_budget(text) == pytest.approx(meant)


@pytest.mark.parametrize("text", ["much", "-1%", "nan%", "0", "0%", "%"])
def test_any_other_budget_is_refused(text):
    with pytest.raises(ValueError, match="expected bytes such as '8MiB' or '1200', or a share"):
        parse_budget(text)


def test_a_number_of_bytes_needs_no_quotes():
    tree = {}
    merge_trees(tree, override("wire.budget=1200"))
    assert parse(tree, "here").wire.budget == "1200"
    assert Config().wire.budget is None


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_old_key_says_what_to_use(name):
    with pytest.raises(ConfigError, match=r"method\.budget is not a setting: use wire\.budget"):
        build(name, {"budget": "1%"})


def test_a_larger_budget_gets_wider_values():
    assert [build("fedsrd").form(budget) for budget in (None, Budget(0.1), Budget(0.2), Budget(size=9))] == [
        *("int4", "int4", "int8", "int4")
    ]
    assert build("fedit").form(Budget(0.9)) == "int8"
