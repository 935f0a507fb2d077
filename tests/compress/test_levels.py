"""Codes of one step for many tensors: as fine as a budget allows, finest where it is worth most."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.entries import Dense, Entry, Quantized, Sparse, to_dense
from fedloom.compress.levels import Part, code_within, without_zeros
from fedloom.wire import Header, Message, decode, encode

HEADER = Header("change", "loom", 1, 0, "0" * 32, "f" * 32, 0)


def size_of(entries: Mapping[str, Entry]) -> int:
    return len(encode(Message(HEADER, entries)))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts(size: float = 1.0) -> dict[str, Part]:
    """Two tensors; the second counts ten times as much."""
    return {
        "q/A": Part(size * normal(1, 4, 500), torch.ones(4, 1)),
        "q/B": Part(size * normal(2, 300, 4), torch.full((1, 4), 10.0)),
    }


def error(part: Part, entry: Entry) -> float:
    lost = (part.values - to_dense(entry)).square().sum() / part.values.square().sum()
    return float(lost)


@pytest.mark.parametrize("budget", [300, 600, 1200, 2400])
def test_a_payload_fills_its_budget_and_never_exceeds_it(budget: int):
    coded = code_within(parts(), budget, size_of)
    assert coded.size == size_of(coded.entries)
    assert 0.9 * budget < coded.size <= budget


def test_more_bytes_never_say_less():
    lost = [
        sum(error(part, code_within(parts(), budget, size_of).entries[name]) for name, part in parts().items())
        for budget in (300, 600, 1200, 2400)
    ]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 0.01 * lost[0]


def test_bits_go_where_they_are_worth_most():
    coded = code_within(parts(), 900, size_of)
    assert error(parts()["q/B"], coded.entries["q/B"]) < 0.2 * error(parts()["q/A"], coded.entries["q/A"])


def test_two_bits_a_value_come_within_a_bit_of_what_is_possible():
    """A normal source at R bits has an error of 4^−R at the least (Shannon)."""
    part = {"q/A": Part(normal(3, 8, 2000), torch.ones(8, 1))}
    coded = code_within(part, 4000, size_of)
    bits = 8 * coded.size / 16000
    assert 4.0**-bits < error(part["q/A"], coded.entries["q/A"]) < 4.0 ** (0.5 - bits)


def test_whole_codes_keep_the_length_of_what_they_stand_for():
    x = normal(4, 3, 400)
    entry = Part(x, torch.ones(3, 1), whole=True).entry(1.5)
    assert float((to_dense(entry) * x).sum()) == pytest.approx(float(x.square().sum()), rel=0.01)
    near = Part(x, torch.ones(3, 1)).entry(1.5)
    assert error(Part(x, torch.ones(3, 1)), near) < error(Part(x, torch.ones(3, 1)), entry)


def test_what_no_budget_holds_is_empty_and_zeros_cost_no_search():
    nothing = code_within(parts(), 1, size_of)
    assert all(isinstance(entry, Sparse) and not entry.positions.numel() for entry in nothing.entries.values())
    calls: list[int] = []

    def counted(entries: Mapping[str, Entry]) -> int:
        calls.append(1)
        return size_of(entries)

    zeros = code_within({"q/A": Part(torch.zeros(4, 50), torch.zeros(4, 1))}, 500, counted)
    assert not to_dense(zeros.entries["q/A"]).any() and len(calls) <= 2


def test_a_tensor_beyond_a_block_has_one_scale():
    entry = Part(normal(5, 2, 70_000), torch.ones(2, 1)).entry(0.5)
    sparse = without_zeros(entry)
    assert isinstance(entry.values, Quantized) and isinstance(sparse.values, Quantized)
    assert entry.values.scales.numel() == 3 and entry.values.scales.unique().numel() == 1
    assert torch.equal(to_dense(sparse), to_dense(entry))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(1e-12, 1e12), st.floats(1e-12, 1e6), st.booleans())
def test_any_size_of_values_and_weights_is_coded_and_travels(seed: int, size: float, weight: float, whole: bool):
    part = Part(size * normal(seed, 3, 40), weight * normal(seed + 1, 3, 1).abs(), whole)
    coded = code_within({"q/A": part}, 200, size_of)
    got = decode(encode(Message(HEADER, coded.entries))).entries["q/A"]
    assert torch.equal(to_dense(got), to_dense(coded.entries["q/A"])) and bool(to_dense(got).isfinite().all())
    assert isinstance(got, Dense | Sparse) and coded.size <= 200
