"""The two sums that methods share, held to sums of dense matrices in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.entries import dense_entry
from fedloom.errors import ShapeError
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import Update
from fedloom.methods.shared.averaging import product_sums, weighted_mean
from toy import SHAPES, delta, random_state

UNEQUAL = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def updates_of(ranks, seed):
    """One update a client, of random factors and unequal shares that sum to 1."""
    total = sum(range(1, len(ranks) + 1))
    states = [random_state(seed + number, rank) for number, rank in enumerate(ranks)]
    return states, [
        Update(str(number), (number + 1) / total, {name: dense_entry(t) for name, t in state.tensors().items()})
        for number, state in enumerate(states)
    ]


@settings(max_examples=20)
@given(UNEQUAL, st.integers(0, 1000))
def test_products_are_summed_by_share_whatever_the_ranks(ranks, seed):
    states, updates = updates_of(ranks, seed)
    beside = random_state(seed + 99, 2)
    plain = product_sums(updates, random_state(0))
    more = product_sums(updates, random_state(0), capped=True, beside=lambda module, rank: beside[module])
    for module in SHAPES:
        ideal = sum(u.weight * delta(s)[module] for u, s in zip(updates, states, strict=True))
        for sums, expected in ((plain, ideal), (more, ideal + delta(beside)[module])):
            found = sums[module].factors()
            torch.testing.assert_close(found.B.double() @ found.A.double(), expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=20)
@given(UNEQUAL, st.integers(0, 1000))
def test_smaller_tensors_are_added_to_the_leading_rows_and_columns(ranks, seed):
    states, updates = updates_of(ranks, seed)
    start = random_state(seed + 99, 4).tensors()
    expected = {name: tensor.double().clone() for name, tensor in start.items()}
    for state, update in zip(states, updates, strict=True):
        for name, tensor in state.tensors().items():
            rows, columns = tensor.shape
            expected[name][:rows, :columns] += update.weight * tensor.double()
    found = weighted_mean(updates, start=start)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_method_may_weigh_and_read_otherwise():
    _, updates = updates_of([2, 2], 5)
    module = "layers.1.down"

    def read(entries):
        return {module: entries[f"{module}/A"].values.double()} if f"{module}/A" in entries else {}

    found = weighted_mean(
        updates,
        read=read,
        weight=lambda update, name: 10.0 if update.client == "1" else 0.0,
    )
    assert found.keys() == {module}
    torch.testing.assert_close(found[module], 10 * updates[1].entries[f"{module}/A"].values.double())


def test_a_pair_of_another_module_is_not_summed():
    wrong = LoraState({module: LoraPair(torch.ones(1, 3), torch.ones(3, 1)) for module in SHAPES})
    update = Update("a", 1.0, {name: dense_entry(t) for name, t in wrong.tensors().items()})
    with pytest.raises(ShapeError, match="cannot be added"):
        product_sums([update], random_state(0))
