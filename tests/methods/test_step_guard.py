"""The guard on the server's step: where FedIT learns, no default may end above the base's loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.budget import Budget
from fedloom.compress.entries import Entry, Sparse, dense_entry, floats, to_dense
from fedloom.compress.quantize import quantize
from fedloom.lora.lowrank.norms import inner_product
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import Context, Method, State, Update
from fedloom.methods.shared.guard import GAIN, UNDONE, Step, Witness, follow, inner_products, store
from fedloom.methods.table import build
from fedloom.records.ledger import Aggregation
from fedloom.report import outcome
from fedloom.rounds.step import Train, Trained
from toy import Federation, initial, job, random_state, take_up

SHAPES = {"up": (48, 32), "down": (32, 48)}
CAST = ["ada", "bob", "cyd", "dan"]
RANK, ROUNDS, STEPS, BATCH = 8, 8, 8, 32
BUDGETS = {"loom": "4%"}
Data = tuple[torch.Tensor, torch.Tensor]


@cache
def task() -> tuple[dict[str, torch.Tensor], dict[str, Data]]:
    """A frozen network of two layers, and every client's inputs with the classes that a changed network gives them."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(m, n, generator=generator) / n**0.5 for name, (m, n) in SHAPES.items()}
    changed = {
        name: base[name]
        + torch.randn(m, 4, generator=generator) @ torch.randn(4, n, generator=generator) / (4 * n) ** 0.5
        for name, (m, n) in SHAPES.items()
    }
    data = {}
    for client in CAST:
        inputs = torch.randn(200, 32, generator=generator) + 0.5 * torch.randn(1, 32, generator=generator)
        data[client] = inputs, output(changed, inputs).argmax(1)
    return base, data


def output(weights: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    return 2 * torch.tanh(inputs @ weights["up"].T) @ weights["down"].T


def loss(adapter: LoraState, fixed: LoraState, data: Data) -> torch.Tensor:
    weights = {
        name: weight + sum(state[name].B @ state[name].A for state in (adapter, fixed) if name in state)
        for name, weight in task()[0].items()
    }
    return torch.nn.functional.cross_entropy(output(weights, data[0]), data[1])


def learner(method: Method, data: Data, rate: float) -> Train:
    """Some steps of AdamW, as the trainer of real models takes them."""

    def train(state: State, round: int, seed: int) -> Trained:
        generator = torch.Generator().manual_seed(seed)
        held = {name: tensor.clone() for name, tensor in state.adapter.tensors().items()}
        live = [tensor.requires_grad_() for name, tensor in held.items() if name[-1] in method.trainable(round)]
        adapter = LoraState({m: LoraPair(held[f"{m}/A"], held[f"{m}/B"]) for m in state.adapter})
        optimiser = torch.optim.AdamW(live, lr=rate)
        for _ in range(STEPS):
            chosen = torch.randperm(len(data[0]), generator=generator)[:BATCH]
            optimiser.zero_grad()
            loss(adapter, state.fixed, (data[0][chosen], data[1][chosen])).backward()
            optimiser.step()
        return Trained(adapter.map(lambda pair: LoraPair(pair.A.detach(), pair.B.detach())), len(data[0]), 0.0)

    return train


def federation(name: str, rate: float, **settings: object) -> tuple[Federation, dict[str, Train]]:
    method, budget = build(name, settings), BUDGETS.get(name)
    form = method.form(Budget(float(budget[:-1]) / 100) if budget else None)
    made = Federation(
        job(method, values=form, budget=budget), {c: dict.fromkeys(SHAPES, RANK) for c in CAST}, shapes=SHAPES
    )
    return made, {client: learner(method, task()[1][client], rate) for client in CAST}


@cache
def end(name: str, rate: float, rounds: int = ROUNDS, **settings: object) -> float:
    """The clients' mean loss after some rounds, as a share of the base's."""
    played, steps = federation(name, rate, **settings)
    for _ in range(rounds):
        played.settle()
        played.round(steps)
    before, after = (
        sum(float(loss(adapter, LoraState(), data)) for data in task()[1].values())
        for adapter in (LoraState(), played.server.total)
    )
    return after / before


@pytest.mark.parametrize(
    ("name", "rate"), [("fedsrd", 0.06), ("fedsrd-e", 0.06), ("florist", 0.12), ("loom", 0.03), ("loom", 0.06)]
)
def test_a_default_ends_below_the_base_at_a_rate_at_which_fedit_learns(name: str, rate: float):
    assert end("fedit", rate) < 0.9
    assert end(name, rate) < 1.0
    assert end(name, rate, step_guard=False) > 1.0


@pytest.mark.parametrize("name", ["fedsrd", "fedsrd-e", "florist", "loom"])
def test_while_clients_agree_nothing_changes(name: str):
    """Bit for bit, what is broadcast is what it is without the guard."""
    sent = []
    for guard in (True, False):
        played, steps = federation(name, 2e-3, step_guard=guard)
        for _ in range(2):
            played.settle()
            played.round(steps)
        sent.append(played.broadcasts)
    assert sent[0] == sent[1]


@pytest.mark.parametrize("name", ["fedsrd", "fedsrd-e", "florist"])
@pytest.mark.parametrize("preset", ["paper", "lossless"])
def test_published_presets_know_no_guard(name: str, preset: str):
    played, steps = federation(name, 0.1, preset=preset)
    for _ in range(2):
        played.settle()
        result = played.round(steps)
    assert GAIN not in result.stats
    assert not played.server.memory


@pytest.mark.parametrize("name", ["fedsrd-e", "florist", "loom"])
def test_a_run_that_is_taken_up_again_goes_on_to_the_same_bits(tmp_path, name):
    """What the guard knows is part of the server's state."""
    one, steps = federation(name, 0.1)
    for _ in range(2):
        one.settle()
        one.round(steps)
    two, _ = federation(name, 0.1)
    take_up(two, one, tmp_path)
    for played in (one, two):
        for _ in range(2):
            played.settle()
            played.round(steps)
    assert one.broadcasts == two.broadcasts
    assert min(value.item() for key, value in one.server.memory.items() if key.endswith(GAIN)) < 1.0


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from(["sign", "int4", "int8", "fp32"]))
def test_a_step_that_clients_undo_is_taken_back(seed, values):
    """And what was sent is what comes back: the adapter is where it was."""
    coded, context = quantize(values), Context(2, seed, quantize(values))
    state = State(initial(seed=seed))
    generator = torch.Generator().manual_seed(seed)
    entries: dict[str, Entry] = {}
    for name, tensor in state.adapter.tensors().items():
        change = torch.randn(tensor.numel(), generator=generator)
        where = torch.randperm(tensor.numel(), generator=generator)[:9].sort().values
        entries[name] = Sparse(tuple(tensor.shape), where, coded(change[where], seed))
    first = Witness(state, on=True)
    known = State(state.adapter, memory=first.remember(first.judge(), entries))
    back = Update("ada", 1.0, {name: dense_entry(-0.1 * to_dense(entry)) for name, entry in entries.items()})
    witness = Witness(known, on=True)
    assert list(witness.watch([back])) == [back]
    verdict = witness.judge()
    assert verdict.agreement == pytest.approx(-1.0)
    assert verdict.wrong
    undone = witness.take_back(verdict, context)
    assert undone.stats == {GAIN: pytest.approx(0.25), UNDONE: 1.0}
    for name, entry in entries.items():
        assert torch.allclose(to_dense(undone.entries[name]), -to_dense(entry), rtol=0.02, atol=1e-6)
    after = Witness(State(state.adapter, memory=undone.memory), on=True)
    assert list(after.watch([back])) == [back]
    assert after.judge().agreement == 0.0  # a step that was taken back is not judged again


@given(st.lists(st.floats(-1, 1), max_size=20))
def test_gains_fall_faster_than_they_rise_and_never_exceed_one(agreements):
    state, gain = State(initial()), 1.0
    for agreement in agreements:
        verdict = follow(state, agreement)
        state = State(state.adapter, memory=store(verdict))
        gain = min(1.0, gain * (2.0 if agreement >= 0 else 4.0) ** agreement)
        assert set(verdict.gains) == set(state.adapter)
        assert all(found == pytest.approx(gain, rel=1e-4) for found in verdict.gains.values())


@given(st.sets(st.integers(0, 59)), st.sets(st.integers(0, 59)))
def test_a_step_adds_an_entry_up_as_a_dense_twin_does(own, sent):
    def chosen(positions: set[int], seed: int) -> torch.Tensor:
        flat = torch.zeros(60)
        flat[sorted(positions)] = 1.0 + torch.rand(len(positions), generator=torch.Generator().manual_seed(seed))
        return flat

    step, entry = chosen(own, 1), chosen(sent, 2).view(6, 10)
    where = step.nonzero().flatten()
    held = entry.flatten().nonzero().flatten()
    wanted = torch.ones(where.numel()).add_(entry.flatten()[where], alpha=0.3)
    for form in (dense_entry(entry), Sparse((6, 10), held, entry.flatten()[held])):
        total = torch.ones(where.numel())
        Step.of(where, step[where], step.numel()).add(total, form, 0.3)
        assert torch.equal(total, wanted)


def test_inner_products_are_those_of_two_pairs():
    pairs = [random_state(seed, rank)["layers.1.down"] for seed, rank in ((1, 4), (2, 3), (3, 4))]
    wanted = torch.tensor([[inner_product(one, other) for other in pairs] for one in pairs])
    assert torch.allclose(inner_products(pairs).float(), wanted, rtol=1e-5)


def test_under_a_budget_a_first_change_of_b_is_never_empty():
    """With nothing but ΔA the first round would move nothing, and a change of A no later one either."""
    state = State(initial())
    after = state.adapter.map(lambda pair: LoraPair(pair.A + 1e3, pair.B + 1e-6 * torch.ones_like(pair.B)))
    for name in ("fedsrd", "fedsrd-e"):
        context = Context(
            1, 3, quantize("int4"), Budget(size=60), size=lambda entries: sum(map(length, entries.values()))
        )
        _, entries = build(name).compress(state, after, context)
        assert all(length(entries[f"{module}/B"]) for module in state.adapter)


def length(entry: Entry) -> int:
    return floats(entry.values).numel()


def test_the_run_says_that_the_guard_acted():
    assert (outcome.GAIN, outcome.UNDONE) == (GAIN, UNDONE)
    gains = {1: 1.0, 2: 0.25, 3: 0.125, 4: 0.95}
    rows = [Aggregation(n, {GAIN: gain, **({UNDONE: 1.0} if n == 2 else {})}, 0.0, n) for n, gain in gains.items()]
    (note,) = outcome.judge_run(rows, 4).notes
    assert note.startswith(
        "the method's guard (method.step_guard) shortened the server's steps in 2 of 4 rounds, to 0.12 of their "
        "length at the least; in round 2 it took the step before back"
    )
    assert not outcome.judge_run([row for row in rows if row.round in (1, 4)], 1).notes


@pytest.mark.parametrize(
    ("name", "settings"),
    [("fedsrd", {}), ("loom", {}), ("loom", {"broadcast": "state"})],
    ids=["fedsrd", "loom", "states"],
)
def test_updates_that_were_begun_before_a_step_say_nothing_of_it(name: str, settings: dict[str, str]):
    """In asynchronous rounds: those that have seen it would have it taken back, and older ones alone change nothing."""
    method, state = build(name, settings), State(random_state(1))
    context = Context(1, 0, quantize("fp32"), Budget(0.5), start=random_state(1))
    change = random_state(2).tensors()

    def sent(sign: float, staleness: int) -> list[Update]:
        return [Update("ada", 1.0, {key: dense_entry(sign * value) for key, value in change.items()}, staleness)]

    first = method.aggregate(state, sent(1.0, 0), context)
    after = replace(method.receive(state, first.entries, context), memory=first.memory)
    later = replace(context, round=2)
    assert UNDONE in method.aggregate(after, sent(-1.0, 0), later).stats
    stale = method.aggregate(after, sent(-1.0, 1), later)
    assert UNDONE not in stale.stats and stale.stats[GAIN] == 1.0
    mixed = method.aggregate(after, [*sent(1.0, 0), *sent(-1.0, 1)], later)
    assert UNDONE not in mixed.stats and mixed.stats[GAIN] == 1.0
