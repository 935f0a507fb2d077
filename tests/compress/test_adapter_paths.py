"""A whole adapter as paths: within the budget, bits where they are worth most, and codes that do not fit refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.entries import Entry, to_dense
from fedloom.compress.levels import Part, code_within
from fedloom.compress.paths import Component, Paths, Traced, choose_rates, component_sizes, scale_of, trace_within
from fedloom.compress.trellis import RATES
from fedloom.errors import WireError
from fedloom.rounds.joint_paths import join_paths
from fedloom.wire import Header, Message, encode

HEADER = Header("change", "loom", 1, 0, "0" * 32, "f" * 32, 0)
SHAPES = {"q/A": (4, 500), "q/B": (300, 4)}


def size_of(entries: Mapping[str, Entry]) -> int:
    shapes = {name: entries[name].shape for name in sorted(entries)}
    return len(encode(Message(HEADER, join_paths(entries, shapes, 4) or entries)))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts(whole: bool = False) -> dict[str, Part]:
    """Two tensors; the second counts ten times as much, and its components unequally."""
    weights = torch.tensor([[10.0, 10.0, 1.0, 0.1]])
    return {
        "q/A": Part(0.01 * normal(1, 4, 500), torch.ones(4, 1), whole),
        "q/B": Part(0.01 * normal(2, 300, 4), weights, whole),
    }


def lost(held: Mapping[str, Part], entries: Mapping[str, Entry]) -> float:
    """The share of Σ (w x)² that is left out."""
    errors = [((part.values - to_dense(entries[name])) * part.weights).square().sum() for name, part in held.items()]
    return float(sum(errors) / sum((part.values * part.weights).square().sum() for part in held.values()))


@pytest.mark.parametrize("budget", [160, 240, 400, 700, 900])
def test_a_payload_fills_its_budget_and_never_exceeds_it(budget: int):
    coded = trace_within(parts(), budget, size_of)
    assert all(isinstance(entry, Traced) for entry in coded.entries.values())
    assert coded.size == size_of(coded.entries)
    assert 0.85 * budget < coded.size <= budget


def test_more_bytes_never_say_less_and_few_say_more_than_codes_do():
    budgets = (200, 300, 500, 800)
    found = [lost(parts(), trace_within(parts(), budget, size_of).entries) for budget in budgets]
    assert found == sorted(found, reverse=True) and found[-1] < 0.15
    assert found[0] < lost(parts(), code_within(parts(), budgets[0], size_of).entries)


def test_many_bits_or_tensors_that_travel_by_name_are_left_to_codes():
    assert not any(isinstance(e, Traced) for e in trace_within(parts(), 4000, size_of).entries.values())
    named = trace_within(parts(), 700, lambda entries: len(encode(Message(HEADER, entries))))
    assert not any(isinstance(entry, Traced) for entry in named.entries.values()) and named.size <= 700


def test_components_worth_most_have_the_most_bits():
    entry = trace_within(parts(), 400, size_of).entries["q/B"]
    assert isinstance(entry, Traced)
    first, second, third, last = entry.paths.rates[4:].tolist()
    assert first == second > third > last == 0


def test_what_is_sent_whole_has_the_length_of_what_is_meant():
    part = Part(normal(1, 4, 500), torch.ones(4, 1), whole=True)
    sent = to_dense(trace_within({"q/A": part}, 400, size_of).entries["q/A"])
    for row, own in zip(sent, part.values, strict=True):
        assert float(row @ own) == pytest.approx(float(own @ own), rel=0.05), "a scale is rounded to an eighth octave"


def test_rates_are_the_best_that_the_bits_allow():
    components = [Component(size * normal(i, 64).numpy(), 1.0, False) for i, size in enumerate((1.0, 0.5, 0.2, 0.05))]
    lost_at, cost_at = (0.0, *(r.per_value for r in RATES)), (1.0, *(r.lost for r in RATES))

    def loss(rates: tuple[int, ...]) -> float:
        return sum(c.worth * cost_at[rate] for c, rate in zip(components, rates, strict=True))

    for bits in (16, 40, 100, 200, 400):
        fitting = [
            loss(rates)
            for rates in product(range(len(RATES) + 1), repeat=4)
            if 64 * sum(lost_at[rate] for rate in rates) <= bits
        ]
        chosen = tuple(choose_rates(components, bits).tolist())
        assert 64 * sum(lost_at[rate] for rate in chosen) <= bits
        assert loss(chosen) <= 1.35 * min(fitting), (bits, chosen)


def test_scales_are_eighths_of_octaves():
    assert [float(scale_of(code)) for code in (-16, 0, 8, 12)] == [0.25, 1.0, 2.0, pytest.approx(2.0**1.5)]
    steps = [float(scale_of(code + 1) / scale_of(code)) for code in range(-128, 127)]
    assert steps == pytest.approx([2 ** (1 / 8)] * 255, rel=1e-6)


def test_zeros_and_components_that_weigh_nothing_are_told_as_zeros():
    held = {"q/A": Part(torch.zeros(4, 500), torch.ones(4, 1)), "q/B": Part(normal(1, 300, 4), torch.zeros(1, 4))}
    coded = trace_within(held, 300, size_of)
    assert all(float(to_dense(entry).abs().sum()) == 0.0 for entry in coded.entries.values())


@settings(max_examples=30)
@given(seed=st.integers(0, 999), budget=st.integers(1, 1200), scale=st.floats(1e-12, 1e6))
def test_any_values_and_budget(seed: int, budget: int, scale: float):
    held = {
        "m/A": Part(scale * normal(seed, 3, 90) ** 3, normal(seed + 1, 3, 1).abs()),
        "m/B": Part(scale * normal(seed + 2, 70, 3), normal(seed + 3, 1, 3).abs()),
    }
    coded = trace_within(held, budget, size_of)
    found = {name: to_dense(entry) for name, entry in coded.entries.items()}
    assert all(
        bool(tensor.isfinite().all()) and tensor.shape == held[name].values.shape for name, tensor in found.items()
    )
    smallest = trace_within(held, 1, size_of).size
    assert coded.size <= max(budget, smallest)


def told() -> Paths:
    entry = trace_within(parts(), 400, size_of).entries["q/A"]
    assert isinstance(entry, Traced)
    return entry.paths


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": np.zeros(3, np.uint8)}, "do not fit"),
        ({"rates": np.full(8, 7, np.int8)}, "none of 0 to 6"),
        ({"rates": np.full(8, -1, np.int8)}, "none of 0 to 6"),
        ({"rates": np.zeros(7, np.int8)}, "7 rates of components do not fit an adapter of 8"),
        ({"rates": np.zeros(8, np.int8)}, "left over"),
    ],
)
def test_codes_that_do_not_fit_are_refused(change: Mapping[str, np.ndarray], said: str):
    with pytest.raises(WireError, match=said):
        replace(told(), **change).tensors(SHAPES)


def test_components_are_rows_of_a_and_columns_of_b():
    assert component_sizes(SHAPES).tolist() == [500] * 4 + [300] * 4
