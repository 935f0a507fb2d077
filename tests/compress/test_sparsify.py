"""Importance, kurtosis, exact top-k and what is kept back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.compress.entries import to_dense
from fedloom.compress.fast import torch_only
from fedloom.compress.sparsify import (
    Adaptive,
    Rescaling,
    factor_norms,
    importance,
    kurtosis,
    select_largest,
    shortlist,
    split,
    top_positions,
)
from fedloom.errors import ConfigError


def tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_importance_matches_the_definition_element_by_element():
    delta_a, delta_b, a, b = tensor(1, 3, 7), tensor(2, 5, 3), tensor(3, 3, 7), tensor(4, 5, 3)
    scores_a, scores_b = importance(delta_a, b, "A"), importance(delta_b, a, "B")
    for u in range(3):
        for v in range(7):
            assert scores_a[u, v].item() == pytest.approx(abs(delta_a[u, v].item()) * b[:, u].norm().item(), rel=1e-5)
    for u in range(5):
        for v in range(3):
            assert scores_b[u, v].item() == pytest.approx(abs(delta_b[u, v].item()) * a[v, :].norm().item(), rel=1e-5)


def test_kurtosis_of_known_laws():
    assert kurtosis(torch.tensor([-1.0, 1.0])) == pytest.approx(1.0)
    assert kurtosis(tensor(0, 200_000)) == pytest.approx(3.0, abs=0.05)
    assert kurtosis(torch.full((9,), 2.0)) == 1.0


def test_adaptive_sparsity_saturates_at_the_published_value():
    heavy = tensor(0, 10_000) ** 3
    assert Adaptive().keep(heavy) == round(0.04 * 10_000)  # ρ = 0.85 + 0.11 once κ ≥ e^1.1
    assert Adaptive().keep(torch.ones(10_000)) == round(0.15 * 10_000)  # κ = 1: ρ = 0.85
    assert Adaptive(0.0, 0.0, 0.0).keep(heavy) == 10_000


def test_impossible_sparsity_is_refused():
    with pytest.raises(ConfigError, match="at most 1"):
        Adaptive(base=0.95, upper=0.11)


@given(st.lists(st.integers(0, 5), min_size=0, max_size=40), st.integers(0, 45))
def test_top_positions_agree_with_a_stable_sort(scores: list[int], keep: int):
    flat = torch.tensor(scores, dtype=torch.float32)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]
    expected = sorted(i for i in order if scores[i] > 0)
    assert top_positions(flat, keep).tolist() == expected


@given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from([math.inf, 2.0]))
def test_sent_and_rest_add_up_to_the_input(seed: int, keep: int, cap: float):
    delta = tensor(seed, 6, 10)
    plain = split(delta, delta.abs(), keep)
    assert torch.equal(to_dense(plain.sent) + plain.rest, delta)
    rescaling = Rescaling("l1", cap)
    gained = split(delta, delta.abs(), keep, rescaling=rescaling)
    gain = rescaling.gain(delta.flatten(), delta.flatten()[gained.sent.positions])
    torch.testing.assert_close(to_dense(gained.sent) / gain + gained.rest, delta)
    assert gained.rest.flatten()[gained.sent.positions].abs().max() == 0


def test_l1_rescale_keeps_the_norm_and_obeys_its_cap():
    delta = tensor(5, 20, 30)
    sent = split(delta, delta.abs(), 60, rescaling=Rescaling("l1")).sent
    assert to_dense(sent).abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-5)
    capped = split(delta, delta.abs(), 60, rescaling=Rescaling("l1", cap=1.5)).sent
    torch.testing.assert_close(to_dense(capped).flatten()[capped.positions], 1.5 * delta.flatten()[capped.positions])


@pytest.mark.parametrize("keep", [6, 60, 550])
def test_few_elements_go_no_further_than_some_norms_of_the_whole(keep):
    delta = tensor(5, 20, 30)
    plain = to_dense(split(delta, delta.abs(), keep, rescaling=Rescaling("l1")).sent)
    held = to_dense(split(delta, delta.abs(), keep, rescaling=Rescaling("l1", step=2.0)).sent)
    most = 2.0 * delta.norm()
    torch.testing.assert_close(held, plain * min(1.0, (most / plain.norm()).item()))
    assert (held.norm() < plain.norm()) == (keep < 550)  # few only are too long
    tiny = split(1e-30 * delta, delta.abs(), keep, rescaling=Rescaling("l1", step=2.0)).sent  # squares of 0
    assert to_dense(tiny).abs().sum().item() == pytest.approx((1e-30 * delta).abs().sum().item(), rel=1e-5)


def test_rounding_goes_into_the_rest():
    delta = tensor(6, 5, 8)
    cut = split(delta, delta.abs(), 12, quantize=lambda values, seed: values.to(torch.bfloat16))
    torch.testing.assert_close(to_dense(cut.sent) + cut.rest, delta, rtol=0, atol=1e-7)
    assert cut.rest.flatten()[cut.sent.positions].abs().max() > 0


def test_a_zero_change_sends_nothing():
    cut = split(torch.zeros(4, 4), torch.zeros(4, 4), 5, rescaling=Rescaling("l1"))
    assert cut.sent.positions.numel() == 0


def slow_leading(scores: list[float], keep: int) -> list[int]:
    """The largest first, ties by position, nothing that is zero."""
    return [i for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)) if scores[i] > 0][:keep]


@given(
    st.lists(st.sampled_from([0.0, 1e-40, 0.5, 1.0, 3.0]) | st.floats(0, 2.0**100, width=32), max_size=60), st.data()
)
def test_every_selection_from_a_shortlist_is_that_of_a_slow_twin(values, data):
    most = data.draw(st.integers(0, len(values) + 2))
    scores = torch.tensor(values, dtype=torch.float32)
    positions, left = shortlist(scores, most)
    assert torch.equal(left, scores[positions])
    for keep in {0, 1, most // 2, most}:
        if keep <= most:
            assert positions[select_largest(left, keep)].tolist() == sorted(slow_leading(scores.tolist(), keep))
    assert top_positions(scores, most).tolist() == sorted(slow_leading(scores.tolist(), most))


def test_compiled_and_plain_selection_list_the_same_elements():
    pytest.importorskip("numba")
    import numba  # noqa: F401 - loaded, so that the loop is used at any size

    scores = torch.rand(40_960, generator=torch.Generator().manual_seed(1)) ** 4
    scores[::7] = 0.5
    for keep in (0, 1, 2_000, 6_000, 30_000, 50_000):
        found = shortlist(scores, keep)
        with torch_only():
            wanted = shortlist(scores, keep)
            largest = [select_largest(scores, number) for number in (keep // 2, keep)]
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        assert all(map(torch.equal, [select_largest(scores, number) for number in (keep // 2, keep)], largest))
        assert keep or not found[0].numel()


@pytest.mark.parametrize("keep", [1, 500, 2000, 39_999])
def test_large_tensors_are_selected_from_exactly_although_a_sample_guides(keep):
    """A sample sees every eleventh element: the large ones may all be hidden between those, or on them."""
    size = 40_960
    even = torch.rand(size, generator=torch.Generator().manual_seed(1))
    hidden = torch.where(torch.arange(size) % 11 == 0, 0.0, even)
    shown = torch.where(torch.arange(size) % 11 == 0, even, 0.0)
    for scores in (even, even**9, torch.ones(size), torch.arange(size) / size, hidden, shown):
        expected = slow_leading(scores.tolist(), keep)
        assert top_positions(scores, keep).tolist() == sorted(expected)
        positions, left = shortlist(scores, keep)
        assert positions[select_largest(left, keep // 2)].tolist() == sorted(expected[: keep // 2])


def test_a_shortlist_of_a_matrix_with_unequal_columns_stays_short():
    """A sample at a multiple of the width would see one column alone, and list nearly all or have to begin anew."""
    for width in (16, 64, 3072):
        scores = tensor(3, 524_288 // width, width).abs() * torch.linspace(0, 1, width) ** 4
        assert 5_000 <= shortlist(scores, 5_000)[0].numel() < 10_000


def test_importance_is_the_magnitude_times_the_reach_bit_by_bit():
    delta, other = tensor(7, 6, 9), tensor(8, 12, 6)
    assert torch.equal(importance(delta, other, "A"), delta.abs() * factor_norms(other, "A"))
    assert torch.equal(importance(delta.T, other.T, "B"), delta.T.abs() * factor_norms(other.T, "B"))
