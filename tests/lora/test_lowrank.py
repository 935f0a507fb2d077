"""Truncation of sums of products: identities, the dense float64 twin, hostile input."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from fedloom.errors import ConfigError, NumericError, ShapeError
from fedloom.lora.lowrank import (
    ProductSum,
    frobenius_norm,
    inner_product,
    products,
    relative_error,
    streaming_cap,
    truncate,
    truncate_all,
)
from fedloom.lora.lowrank.kernels import spectrum_by_gram
from fedloom.lora.lowrank.spectrum import Wanted
from fedloom.lora.lowrank.stack import Stack
from fedloom.lora.pair import LoraPair, stack_pairs

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}


def pair(m, n, r, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator)
    return LoraPair((a / max(n, 1) ** 0.5).to(dtype), (b * scale).to(dtype))


def cohort(m, n, ranks, dtype=torch.float32):
    pairs = [pair(m, n, r, seed=i + 1, dtype=dtype, scale=0.1 + i) for i, r in enumerate(ranks)]
    weights = [(i + 1) / (len(ranks) * (len(ranks) + 1) / 2) for i in range(len(ranks))]
    return pairs, weights


def summed(pairs, weights, **options):
    total = ProductSum(pairs[0].shape, **options)
    for p, w in zip(pairs, weights, strict=True):
        total.add(p, w)
    return total


def assert_components(cut, matrix):
    """Orthonormal rows, columns of length σ, σ and lost energy as in the dense matrix, the best of that rank."""
    p = cut.pair.rank
    tolerance = 1e-5 if cut.pair.A.dtype == torch.float32 else 1e-11
    exact = reference.singular_values(matrix)
    top = float(exact[0]) if exact.numel() else 0.0
    a, b = cut.pair.A.double(), cut.pair.B.double()
    assert torch.allclose(a @ a.T, torch.eye(p, dtype=torch.float64), atol=tolerance)
    assert torch.allclose(b.norm(dim=0), exact[:p], atol=tolerance * max(top, 1e-30), rtol=0)
    assert torch.allclose(cut.singular_values[:p], exact[:p], atol=tolerance * max(top, 1e-30), rtol=0)
    error, best = float((b @ a - matrix).norm()), float(exact[p:].square().sum().sqrt())
    assert error <= best * (1 + 1e-8) + tolerance * top
    total = float(exact.square().sum())
    assert math.isclose(cut.lost_energy, best**2 / total if total else 0.0, rel_tol=1e-5, abs_tol=1e-12)


@settings(max_examples=40)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    rank=st.none() | st.integers(0, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_truncated_sum_is_the_best_approximation(m, n, ranks, rank, dtype):
    pairs, weights = cohort(m, n, ranks, dtype)
    cut = summed(pairs, weights).truncate(rank=rank)
    matrix = reference.product_sum(pairs, weights)
    assert_components(cut, matrix)
    if rank is None:
        assert float((reference.dense(cut.pair) - matrix).norm()) <= EXACT[dtype] * (float(matrix.norm()) + 1e-30)


@settings(max_examples=30)
@given(tau=st.floats(0.01, 1.0), ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_the_energy_cut_is_the_least_rank_that_holds_the_share(tau, ranks):
    pairs, weights = cohort(20, 30, ranks, torch.float64)
    cut = summed(pairs, weights).truncate(energy=tau)
    matrix = reference.product_sum(pairs, weights)
    assert cut.lost_energy <= 1 - tau + 1e-12
    assert cut.pair.rank == (sum(ranks) if tau == 1.0 else reference.energy_rank(matrix, tau))
    b, a = reference.florist(pairs, weights, tau)
    if tau < 1.0:
        assert torch.allclose(reference.dense(cut.pair), b @ a, atol=1e-10)


def test_energy_one_means_everything_and_a_hair_less_does_not_lose_the_largest():
    pairs, weights = cohort(40, 30, [4, 4])
    assert truncate(stack_pairs(pairs), energy=1.0).pair.rank == 8
    assert summed(pairs, weights).truncate(energy=1e-9).pair.rank == 1


def test_identical_clients_have_the_rank_of_one():
    one = pair(50, 40, 6)
    assert summed([one] * 5, [0.1, 0.2, 0.3, 0.15, 0.25]).truncate(energy=1.0).pair.rank == 6


def test_nothing_changes_by_order_gauge_or_side_of_the_weights():
    pairs, weights = cohort(60, 50, [4, 8, 6], torch.float64)
    base = reference.dense(summed(pairs, weights).truncate(rank=5).pair)
    turned = summed(pairs[::-1], weights[::-1]).truncate(rank=5)
    gauge = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 4 * torch.eye(8)
    moved = [pairs[0], LoraPair(torch.linalg.inv(gauge) @ pairs[1].A, pairs[1].B @ gauge), pairs[2]]
    other_side = [LoraPair(w * p.A, p.B) for p, w in zip(pairs, weights, strict=True)]
    for same in (turned, summed(moved, weights).truncate(rank=5), summed(other_side, [1.0] * 3).truncate(rank=5)):
        assert torch.allclose(reference.dense(same.pair), base, atol=1e-11)


@pytest.mark.parametrize("kernel", ["gram", "qr"])
def test_every_kernel_agrees_with_the_dense_matrix(kernel):
    decay = torch.logspace(0, -3, 60)
    terms = pair(150, 120, 60)
    terms = LoraPair(terms.A, terms.B * decay)
    cut = truncate(terms, rank=8, kernel=kernel)
    assert cut.kernel == kernel
    assert_components(cut, reference.dense(terms))


@pytest.mark.parametrize("kernel", ["gram", "qr"])
def test_a_flat_spectrum_costs_no_accuracy(kernel):
    generator = torch.Generator().manual_seed(5)
    q = [torch.linalg.qr(torch.randn(size, 80, generator=generator, dtype=torch.float64)).Q for size in (200, 150)]
    terms = LoraPair(q[1].T.float(), q[0].float())
    cut = truncate(terms, rank=10, kernel=kernel)
    assert cut.kernel == kernel
    assert abs(cut.lost_energy - 70 / 80) < 1e-6
    assert relative_error(cut.pair, [terms], [1.0]) <= (70 / 80) ** 0.5 * (1 + 1e-6)


def test_float64_factors_take_qr_and_others_gram_matrices():
    terms = pair(30, 20, 6)
    assert truncate(terms).kernel == "gram"
    assert truncate(LoraPair(terms.A, terms.B.double())).kernel == "qr"


def test_clients_that_cancel_leave_gram_without_digits_and_it_says_so():
    one = pair(40, 30, 4)
    nearly = LoraPair(one.A, -one.B * (1 + 1e-6))
    terms = stack_pairs([one, nearly])
    assert spectrum_by_gram(Stack(terms.shape, ((terms, 1.0),)), Wanted()) is None
    cut = truncate(terms)
    assert cut.kernel == "qr"
    assert_components(cut, reference.dense(terms))


def test_the_lost_energy_is_accurate_even_when_tiny():
    u = torch.linalg.qr(torch.randn(90, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    v = torch.linalg.qr(torch.randn(70, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    terms = LoraPair(v.T.float(), (u * torch.tensor([1.0, 0.5, 1e-4])).float())
    exact = reference.singular_values(reference.dense(terms)).square()
    assert truncate(terms, rank=2).lost_energy == pytest.approx(float(exact[2] / exact.sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_goes_in_and_float32_comes_out(dtype):
    half = pair(30, 20, 4, dtype=dtype)
    cut = summed([half, half], [0.25, 0.75]).truncate()
    assert cut.pair.A.dtype == cut.pair.B.dtype == torch.float32
    assert relative_error(cut.pair, [half], [1.0]) < 1e-6


@pytest.mark.parametrize("zero", [0, 3])
def test_a_sum_of_nothing_has_rank_zero(zero):
    empty = LoraPair(torch.zeros(zero, 7), torch.zeros(5, zero))
    for cut in (ProductSum((5, 7)).truncate(energy=0.9), truncate(empty), summed([empty], [1.0]).truncate(rank=2)):
        assert cut.pair.rank == 0
        assert cut.pair.shape == (5, 7)
        assert cut.lost_energy == 0.0
    assert truncate(pair(5, 7, 2), rank=0).lost_energy == 1.0


def test_equal_input_gives_equal_bits_also_in_threads_and_signs_are_fixed():
    pairs = {f"m{i}": pair(80, 60, 12, seed=i) for i in range(6)}
    first, second = truncate_all(pairs, rank=5), truncate_all(pairs, rank=5)
    for module, p in pairs.items():
        flipped = truncate(LoraPair(-p.A, -p.B), rank=5)
        for part in ("A", "B"):
            assert torch.equal(first[module].pair.part(part), second[module].pair.part(part))
            assert torch.allclose(first[module].pair.part(part), flipped.pair.part(part), atol=1e-5)
        lead = first[module].pair.A
        assert bool((lead.gather(1, lead.abs().argmax(1, keepdim=True)) > 0).all())


def test_streaming_without_a_cap_loses_nothing_and_holds_no_more_than_the_rank_allows():
    pairs, weights = cohort(12, 20, [4] * 30, torch.float64)
    total = ProductSum((12, 20))
    for p, w in zip(pairs, weights, strict=True):
        total.add(p, w)
        assert total.rank <= 24
    assert total.lost == 0.0 or total.lost < 1e-12
    assert relative_error(total.factors(), pairs, weights) < 1e-12


def test_streaming_with_a_cap_reports_at_least_what_it_lost():
    common, noise = pair(40, 50, 4), [pair(40, 50, 4, seed=i + 1, scale=0.1) for i in range(30)]
    pairs, weights = [LoraPair(common.A + 0.1 * p.A, common.B + p.B) for p in noise], [1 / 30] * 30
    total = ProductSum((40, 50), cap=10)
    for p, w in zip(pairs, weights, strict=True):
        total.add(p, w)
        assert total.rank <= 20
    cut = total.truncate(rank=4)
    true_loss = relative_error(cut.pair, pairs, weights) ** 2
    assert 0.0 < true_loss <= cut.lost_energy < 0.5


@settings(max_examples=20)
@given(ranks=st.lists(st.integers(0, 5), min_size=2, max_size=2))
def test_norms_and_inner_products_are_those_of_the_products(ranks):
    (first, second), _ = cohort(9, 14, ranks)
    left, right = reference.dense(first), reference.dense(second)
    assert math.isclose(frobenius_norm(first), float(left.norm()), rel_tol=1e-12, abs_tol=1e-12)
    assert math.isclose(inner_product(first, second), float((left * right).sum()), rel_tol=1e-9, abs_tol=1e-9)
    expected = float((left - right).norm()) / float(right.norm()) if ranks[1] else (math.inf if ranks[0] else 0.0)
    assert math.isclose(relative_error(first, [second], [1.0]), expected, rel_tol=1e-9, abs_tol=1e-12)


def test_bad_input_is_named():
    bad = pair(5, 6, 2)
    bad.B[0, 0] = math.nan
    with pytest.raises(NumericError, match="B of a pair"):
        truncate(bad)
    with pytest.raises(NumericError, match="infinity"):
        truncate(LoraPair(torch.full((1, 3), math.inf), torch.ones(2, 1)))
    with pytest.raises(ShapeError, match=r"\(5, 6\)"):
        ProductSum((6, 5)).add(pair(5, 6, 2), 1.0)
    for wrong in ({"energy": 0.0}, {"energy": 1.5}, {"rank": -1}):
        with pytest.raises(ConfigError):
            truncate(pair(5, 6, 2), **wrong)
    with pytest.raises(ConfigError, match="cap"):
        ProductSum((5, 6), cap=0)


def decaying(m, n, stacked, fall, seed=0):
    """A sum of one term whose singular values fall from 1 by `fall` at each step, then are the same random noise."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(s, stacked, generator=generator, dtype=torch.float64)).Q for s in (m, n))
    sizes = torch.maximum(fall ** torch.arange(stacked, dtype=torch.float64), torch.tensor(0.03))
    gauge = torch.linalg.qr(torch.randn(stacked, stacked, generator=generator, dtype=torch.float64)).Q
    return LoraPair((gauge.T @ v.T).float(), ((u * sizes) @ gauge).float())


@settings(max_examples=15)
@given(
    m=st.integers(64, 120),
    n=st.integers(64, 120),
    stacked=st.sampled_from([40, 64]),
    rank=st.integers(1, 4),
    fall=st.floats(0.1, 1.0),
    seed=st.integers(0, 99),
)
def test_few_components_of_many_are_the_best_whatever_the_spectrum(m, n, stacked, rank, fall, seed):
    terms = decaying(m, n, stacked, fall, seed)
    cut = truncate(terms, rank=rank, kernel="gram")
    assert cut.pair.rank == rank
    exact = reference.singular_values(reference.dense(terms))
    best = float(exact[rank:].square().sum().sqrt())
    error = float((reference.dense(cut.pair) - reference.dense(terms)).norm())
    assert error <= best * (1 + 1e-8) + 1e-7
    assert cut.lost_energy == pytest.approx(best**2 / float(exact.square().sum()), rel=1e-4)
    gram = cut.pair.A.double() @ cut.pair.A.double().T
    assert torch.allclose(gram, torch.eye(rank, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize(("fall", "computed"), [(0.5, 4), (1.0, 64)])
def test_all_components_are_computed_only_where_few_do_not_do(fall, computed):
    terms = decaying(100, 90, 64, fall)
    assert truncate(terms, rank=4, kernel="gram").singular_values.numel() == computed
    exact = reference.singular_values(reference.dense(terms))
    share = float(exact[:3].square().sum() / exact.square().sum()) - 1e-3
    total = ProductSum(terms.shape)
    for first in range(0, 64, 4):
        total.add(LoraPair(terms.A[first : first + 4], terms.B[:, first : first + 4]), 1.0)
    cut = total.truncate(energy=share)
    assert cut.singular_values.numel() == computed
    assert cut.pair.rank == reference.energy_rank(reference.dense(terms), share)


@settings(max_examples=20)
@given(fall=st.floats(0.3, 1.0), share=st.sampled_from([0.5, 0.9, 0.99, 1 - 1e-5]), seed=st.integers(0, 99))
def test_a_share_of_the_energy_is_exact_however_the_gram_matrices_were_multiplied(fall, share, seed):
    terms = decaying(100, 90, 40, fall, seed)
    matrix = reference.dense(terms)
    cut = truncate(terms, energy=share, kernel="gram")
    exact = reference.singular_values(matrix)
    assert cut.pair.rank == reference.energy_rank(matrix, share)
    assert cut.singular_values.numel() in (cut.pair.rank, 40)
    assert torch.allclose(cut.singular_values, exact[: cut.singular_values.numel()], atol=1e-6, rtol=0)
    best = float(exact[cut.pair.rank :].square().sum().sqrt())
    assert float((reference.dense(cut.pair) - matrix).norm()) <= best * (1 + 1e-8) + 5e-7 * float(matrix.norm())


def test_a_share_of_the_energy_takes_float64_only_where_the_tail_is_tiny():
    terms = decaying(100, 90, 40, 0.5)
    few, all_ = truncate(terms, energy=0.9, kernel="gram"), truncate(terms, energy=1 - 1e-5, kernel="gram")
    assert few.singular_values.numel() == few.pair.rank
    assert all_.singular_values.numel() == 40


def test_rows_stay_orthonormal_where_the_terms_of_a_row_cancel():
    first, second = pair(90, 80, 6, seed=1), pair(90, 80, 6, seed=2)
    nearly = LoraPair(first.A + 1e-3 * second.A, -first.B)
    total = ProductSum(first.shape)
    for term in (first, nearly):
        total.add(term, 1.0)
    cut = total.truncate(rank=6)
    assert cut.kernel == "gram"
    a = cut.pair.A.double()
    assert torch.allclose(a @ a.T, torch.eye(6, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_huge_and_tiny_factors_take_the_same_way(scale):
    terms = decaying(100, 90, 64, 0.5)
    plain, scaled = truncate(terms, rank=4), truncate(LoraPair(terms.A * scale, terms.B * scale), rank=4)
    assert scaled.singular_values.numel() == 4
    assert torch.allclose(scaled.singular_values / scale**2, plain.singular_values, rtol=1e-6)
    assert scaled.lost_energy == pytest.approx(plain.lost_energy, rel=1e-4)


def test_a_share_of_the_energy_beyond_the_expected_rank_takes_all_components():
    terms = decaying(100, 90, 64, 0.2)
    total = ProductSum(terms.shape)
    for first in range(0, 64, 4):
        total.add(LoraPair(terms.A[first : first + 4], terms.B[:, first : first + 4]), 1.0)
    cut = total.truncate(energy=0.99)
    assert cut.pair.rank == reference.energy_rank(reference.dense(terms), 0.99) > 4
    assert cut.lost_energy <= 0.01


def test_a_tail_too_small_for_float32_gram_matrices_is_not_lost():
    generator = torch.Generator().manual_seed(4)
    u, v = (torch.linalg.qr(torch.randn(s, 48, generator=generator, dtype=torch.float64)).Q for s in (90, 80))
    sizes = torch.cat([torch.ones(4), torch.full((44,), 1e-4)]).double()
    terms = LoraPair(v.T.float(), (u * sizes).float())
    cut = truncate(terms, rank=4, kernel="gram")
    assert cut.lost_energy == pytest.approx(float(sizes[4:].square().sum() / sizes.square().sum()), rel=1e-4)


def around(common, count, spread):
    """Clients that began with the same adapter, and moved by so much."""
    moves = [pair(*common.shape, common.rank, seed=i + 1) for i in range(count)]
    return [LoraPair(common.A + spread * p.A, common.B + spread * p.B) for p in moves]


@pytest.mark.parametrize("spread", [1e-3, 0.05, 0.3])
@pytest.mark.parametrize("wanted", [{"rank": 4}, {"energy": 0.9}, {"energy": 0.999}])
def test_products_alone_find_what_clients_have_in_common(monkeypatch, spread, wanted):
    monkeypatch.setattr(products, "PAIRED_RANK", 0)
    pairs, weights = around(pair(110, 100, 4), 24, spread), [1 / 24] * 24
    cut, matrix = summed(pairs, weights).truncate(**wanted), reference.product_sum(pairs, weights)
    exact = reference.singular_values(matrix)
    assert cut.pair.rank == wanted.get("rank") or cut.pair.rank == reference.energy_rank(matrix, wanted["energy"])
    best = float(exact[cut.pair.rank :].square().sum().sqrt())
    error = float((reference.dense(cut.pair) - matrix).norm())
    assert error <= best * (1 + 1e-8) + 1e-6 * float(exact[0])
    gram = cut.pair.A.double() @ cut.pair.A.double().T
    assert torch.allclose(gram, torch.eye(cut.pair.rank, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(cut.singular_values[: cut.pair.rank], exact[: cut.pair.rank], atol=1e-6 * float(exact[0]))
    if cut.kernel == "products":
        assert cut.lost_energy == pytest.approx(best**2 / float(exact.square().sum()), rel=0.5)
    assert cut.kernel == "products" or wanted == {"energy": 0.999}


def test_products_decline_where_their_answer_would_be_a_guess(monkeypatch):
    monkeypatch.setattr(products, "PAIRED_RANK", 0)
    flat = decaying(100, 90, 64, 1.0)
    assert truncate(flat, rank=4, kernel="products").kernel == "qr"
    pairs, weights = around(pair(110, 100, 4), 24, 0.3), [1 / 24] * 24
    matrix = reference.product_sum(pairs, weights)
    exact = reference.singular_values(matrix).square()
    held = float(exact[:4].sum() / exact.sum())
    # So near to what four components hold that the sample cannot tell on which side of it.
    for share in (held * (1 - 1e-4), held * (1 + 1e-4)):
        cut = summed(pairs, weights).truncate(energy=share)
        assert cut.kernel == "gram"
        assert cut.pair.rank == reference.energy_rank(matrix, share)


def test_what_is_made_later_counts_as_the_memory_that_it_takes():
    pairs, weights = around(pair(40, 50, 4), 40, 0.1), [1 / 40] * 40
    total = ProductSum((40, 50), cap=20)
    for p, w in zip(pairs, weights, strict=True):
        total.add_later(partial(LoraPair, p.A, p.B), p.shape, 4, 4 * 90, w)  # a byte a value
    assert total.rank == 160 and total.lost == 0.0
    assert relative_error(total.factors(), pairs, weights) < 1e-6
    total.add_later(partial(LoraPair, pairs[0].A, pairs[0].B), (40, 50), 4, 4 * 90, 1.0)
    assert total.rank == 24 and total.lost > 0.0


def test_the_streaming_cap_is_exact_for_common_cohorts_and_far_above_the_rank():
    assert [streaming_cap(rank) for rank in (8, 128, 256)] == [512, 512, 1024]


def test_a_sum_holds_what_it_is_given_and_copies_nothing():
    first = pair(30, 20, 4)
    total = summed([first], [1.0])
    later = summed([first], [1.0])
    later.add_later(lambda: first, first.shape, first.rank, 800, 0.5)
    assert later.rank == 8 and relative_error(later.factors(), [first], [1.5]) < 1e-6
    held = total._stack().terms[0][0]
    assert held.A.data_ptr() == first.A.data_ptr()
    assert held.B.data_ptr() == first.B.data_ptr()
