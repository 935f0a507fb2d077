"""FedSRD's server step, held to its dense float64 twin; compiled and torch-only kernels agree."""

import importlib.util
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference
from fedloom.compress.entries import Seeded, Sparse, dense_entry, to_dense
from fedloom.compress.masks import seeded_mask
from fedloom.errors import NumericError, ShapeError
from fedloom.lora.lowrank import ProductChange, change, sparse
from fedloom.lora.lowrank.gram import gram
from fedloom.lora.lowrank.inverse import inverse
from fedloom.lora.pair import LoraPair


@pytest.fixture(params=["numba", "torch"])
def backend(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(sparse, "_compiled", lambda: None)
    return request.param


def some(shape, density, seed, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    positions = (torch.rand(shape[0] * shape[1], generator=generator) < density).nonzero().squeeze(1)
    return Sparse(shape, positions, torch.randn(positions.numel(), generator=generator).pow(3) * scale)


def updates(m, n, r, count, density=0.1):
    return [(some((m, r), density, 2 * i), some((r, n), density, 2 * i + 1)) for i in range(count)]


def global_pair(m, n, r, condition=10.0, seed=0):
    """Both factors have singular values from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for size in (m, n):
        q = torch.linalg.qr(torch.randn(size, r, generator=generator, dtype=torch.float64)).Q
        g = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
        factors.append((q * condition ** -torch.linspace(0, 1, r, dtype=torch.float64)) @ g)
    return LoraPair(factors[1].T.float(), factors[0].float())


def solved(pair, side, changes, weights, **options):
    total = ProductChange(pair, side, **options)
    for (delta_b, delta_a), weight in zip(changes, weights, strict=True):
        total.add(delta_b, delta_a, weight)
    return total.solve()


def deviation(found, pair, side, changes, weights, **options):
    exact = reference.fedsrd(pair, [(to_dense(b), to_dense(a)) for b, a in changes], weights, side, **options)
    assert found.delta.shape == exact.shape
    assert found.delta.dtype == torch.float32
    return float((found.delta.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("rank", [None, 4, 8])
def test_the_change_is_that_of_the_dense_formula(backend, condition, side, rank):
    pair, weights = global_pair(90, 70, 8, condition), [0.1, 0.2, 0.3, 0.4]
    changes = updates(90, 70, 8, 4)
    found = solved(pair, side, changes, weights, rank=rank)
    assert deviation(found, pair, side, changes, weights, rank=rank) < 2e-5
    assert found.kept == 8
    assert found.condition == pytest.approx(condition, rel=0.05)


@settings(max_examples=30)
@given(
    m=st.integers(4, 30),
    n=st.integers(4, 30),
    r=st.integers(1, 4),
    count=st.integers(1, 5),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    side=st.sampled_from("AB"),
    full=st.booleans(),
)
def test_any_shape_weights_and_density(m, n, r, count, density, side, full):
    pair, weights = global_pair(m, n, r), [0.3 + i for i in range(count)]
    changes = updates(m, n, r, count, density)
    rank = r if full else None
    assert deviation(solved(pair, side, changes, weights, rank=rank), pair, side, changes, weights, rank=rank) < 1e-4


@pytest.mark.parametrize("rank", [None, 6])
@pytest.mark.parametrize("side", ["A", "B"])
def test_all_forms_of_an_entry_mean_the_same(backend, side, rank):
    pair = global_pair(40, 50, 6)
    mask = seeded_mask(240, 0.25, 7)
    seeded = Seeded((40, 6), 7, 0.25, torch.randn(int(mask.sum())) * 0.01)
    changes = [(seeded, some((6, 50), 0.2, 1)), (some((40, 6), 0.2, 2), dense_entry(torch.randn(6, 50) * 0.01))]
    found = solved(pair, side, changes, [0.5, 0.5], rank=rank)
    assert deviation(found, pair, side, changes, [0.5, 0.5], rank=rank) < 2e-5


@pytest.mark.parametrize("side", ["A", "B"])
def test_ridge_and_cut_off_are_those_of_the_formula(backend, side):
    pair, changes = global_pair(60, 50, 6, 1e4), updates(60, 50, 6, 2)
    for options in ({"ridge": 0.03}, {"rcond": 1e-2}, {"ridge": 1e-4, "rcond": 1e-3}):
        found = solved(pair, side, changes, [0.5, 0.5], **options)
        assert deviation(found, pair, side, changes, [0.5, 0.5], **options) < 2e-5
    assert solved(pair, side, changes, [0.5, 0.5], rcond=1e-2).kept == 3


def test_a_factor_short_of_its_rank_is_cut_off_and_reported(backend):
    pair, changes = global_pair(60, 50, 6), updates(60, 50, 6, 2)
    lame = LoraPair(pair.A, pair.B.clone())
    lame.B[:, 5] = lame.B[:, 4]
    found = solved(lame, "A", changes, [0.5, 0.5])
    assert found.kept == 5
    assert deviation(found, lame, "A", changes, [0.5, 0.5]) < 2e-5


@pytest.mark.parametrize("rank", [None, 12])
@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize(("m", "n"), [(6, 40), (40, 6), (6, 7)])
def test_a_rank_above_the_size_of_the_module_is_no_obstacle(backend, m, n, side, rank):
    pair = LoraPair(0.1 * torch.randn(12, n), torch.randn(m, 12))
    changes = updates(m, n, 12, 3, density=0.5)
    found = solved(pair, side, changes, [0.2, 0.3, 0.5], rank=rank)
    assert found.kept == min(12, m if side == "A" else n)
    assert deviation(found, pair, side, changes, [0.2, 0.3, 0.5], rank=rank) < 1e-4


@pytest.mark.parametrize("rank", [None, 4])
def test_a_zero_factor_gives_a_zero_change(backend, rank):
    pair = LoraPair(torch.randn(4, 30), torch.zeros(20, 4))
    found = solved(pair, "A", updates(20, 30, 4, 2), [0.5, 0.5], rank=rank)
    assert (found.kept, found.condition) == (0, 0.0)
    assert torch.equal(found.delta, torch.zeros(4, 30))
    first = solved(pair, "B", updates(20, 30, 4, 2), [0.5, 0.5], rank=rank)
    assert bool(first.delta.abs().sum() > 0)


@pytest.mark.parametrize("rank", [None, 4])
def test_clients_without_a_change_change_nothing(backend, rank):
    pair = global_pair(20, 30, 4)
    silent = [(some((20, 4), 0.0, 0), some((4, 30), 0.0, 0))] * 3
    for side in "AB":
        assert float(solved(pair, side, silent, [0.25, 0.25, 0.5], rank=rank).delta.norm()) < 1e-5
        assert float(solved(pair, side, [], [], rank=rank).delta.norm()) == 0.0


def test_many_clients_are_recompressed_not_held(monkeypatch):
    monkeypatch.setattr(change, "streaming_cap", lambda rank: 8)
    pair, weights = global_pair(60, 50, 4), [1 / 20] * 20
    changes = updates(60, 50, 4, 20, density=0.2)
    total = ProductChange(pair, "A", rank=4)
    for (delta_b, delta_a), weight in zip(changes, weights, strict=True):
        total.add(delta_b, delta_a, weight)
        assert sum(held.bytes for held in total._held) <= 4 * 2 * 8 * (60 + 50)
    assert total._spilled is not None
    assert deviation(total.solve(), pair, "A", changes, weights, rank=4) < 0.1


@pytest.fixture
def one_way(monkeypatch):
    """Of FedSRD's three ways the subspace alone: the others fail."""

    def refuse(self, rank):
        raise AssertionError("another way was taken")

    monkeypatch.setattr(change, "PAIRED_RANK", 0)
    monkeypatch.setattr(ProductChange, "_by_gram", refuse)
    monkeypatch.setattr(ProductChange, "_by_sum", refuse)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("scale", [0.02, 1e-4])
@pytest.mark.parametrize("count", [5, 40])
def test_the_leading_directions_alone_give_the_dense_formulas_change(backend, one_way, side, scale, count):
    pair, weights = global_pair(90, 70, 4, 3.0), [(1 + i % 3) / count for i in range(count)]
    parts = range(count)
    changes = [(some((90, 4), 0.1, 2 * i, scale), some((4, 70), 0.1, 2 * i + 1, scale)) for i in parts]
    found = solved(pair, side, changes, weights, rank=4)
    assert deviation(found, pair, side, changes, weights, rank=4) < 2e-5
    mask = [(dense_entry(to_dense(b)), a) for b, a in changes]
    assert torch.allclose(solved(pair, side, mask, weights, rank=4).delta, found.delta, atol=1e-6)


def test_without_a_gap_behind_the_rank_the_leading_directions_do_not_answer(monkeypatch):
    monkeypatch.setattr(change, "PAIRED_RANK", 0)
    pair, weights = global_pair(90, 70, 4, 1e4), [1 / 12] * 12
    changes = updates(90, 70, 4, 12, density=0.6)
    total = ProductChange(pair, "A", rank=4)
    for (delta_b, delta_a), weight in zip(changes, weights, strict=True):
        total.add(delta_b, delta_a, weight)
    assert total._by_subspace(4) is None
    assert deviation(total.solve(), pair, "A", changes, weights, rank=4) < 2e-4


def test_solving_twice_gives_the_same_bits(backend):
    pair, changes = global_pair(60, 50, 6), updates(60, 50, 6, 3)
    for rank in (None, 6):
        total = ProductChange(pair, "B", rank=rank)
        for delta_b, delta_a in changes:
            total.add(delta_b, delta_a, 1 / 3)
        assert torch.equal(total.solve().delta, total.solve().delta)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from([1, 7, 40, 600, 1500]),
    rank=st.sampled_from([1, 3, 8, 33, 64]),
    density=st.sampled_from([0.0, 0.002, 0.05, 1.0]),
    turned=st.booleans(),
    quick=st.booleans(),
    wider=st.sampled_from([0, 3]),
    seed=st.integers(0, 99),
)
def test_sparse_products_are_those_of_the_dense_matrix(backend, size, rank, density, turned, quick, wider, seed):
    piece = sparse.tall_change(some((rank, size) if turned else (size, rank), density, seed, scale=1.0), turned)
    whole = piece.to_dense().double()
    generator = torch.Generator().manual_seed(seed)
    factor, mixing = (torch.randn(lines, rank + wider, generator=generator) for lines in (size, rank))
    found, bound = sparse.project(factor, piece, quick=quick), factor.abs().double().T @ whole.abs()
    assert found.dtype == torch.float64
    assert bool(((found - factor.double().T @ whole).abs() <= (1e-5 if quick else 1e-13) * bound).all())
    total = factor.clone()
    sparse.spread(total, piece, mixing)
    bound = factor.abs().double() + whole.abs() @ mixing.abs().double()
    assert bool(((total.double() - factor.double() - whole @ mixing.double()).abs() <= 1e-5 * bound).all())


def test_crossed_changes_are_the_gram_matrix_of_their_stack():
    pytest.importorskip("numba")
    pieces = [sparse.tall_change(some((5, 40) if turned else (40, 5), 0.3, 3), turned) for turned in (False, True)]
    stack = torch.cat([piece.to_dense().double() for piece in pieces], dim=1)
    assert torch.allclose(sparse.cross_products(pieces), stack.T @ stack, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_a_line_has_its_elements_in_the_order_of_places(turned):
    entry = some((6, 50) if turned else (50, 6), 0.3, 5)
    piece = sparse.tall_change(entry, turned)
    for by_row in (False, True):
        whole = piece.to_dense() if by_row else piece.to_dense().T
        places, starts, values = piece.lines(by_row)
        assert starts.tolist() == [0, *(whole != 0).sum(1).cumsum(0).tolist()]
        assert torch.equal(places, whole.nonzero()[:, 1])
        assert torch.equal(values, whole[whole != 0])


def test_bad_input_is_named(backend):
    pair = global_pair(20, 30, 4)
    fine_b, fine_a = updates(20, 30, 4, 1)[0]
    total = ProductChange(pair, "A")
    broken = Sparse(fine_a.shape, fine_a.positions, fine_a.values.clone())
    broken.values[0] = math.inf
    with pytest.raises(NumericError, match="change of A"):
        total.add(fine_b, broken, 1.0)
    with pytest.raises(ShapeError, match=r"change of B has shape \(4, 20\)"):
        total.add(some((4, 20), 0.1, 0), fine_a, 1.0)
    for positions in ([3, 2], [-1, 2], [0, 80], [5, 5]):
        with pytest.raises(ShapeError, match="positions"):
            total.add(Sparse((20, 4), torch.tensor(positions), torch.ones(2)), fine_a, 1.0)


def test_numba_is_optional(monkeypatch):
    sparse._compiled.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert sparse.compiled_for(torch.zeros(1)) is None
    sparse._compiled.cache_clear()


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("rank", [None, 5])
def test_asking_twice_or_in_between_changes_nothing(side, rank, backend):
    changes, weights = updates(40, 30, 5, 3), [0.2, 0.5, 0.3]
    pair = global_pair(40, 30, 5)
    total = ProductChange(pair, side, rank=rank)
    for (delta_b, delta_a), weight in zip(changes, weights, strict=True):
        total.add(delta_b, delta_a, weight)
        total.solve()
    once = solved(pair, side, changes, weights, rank=rank).delta
    for _ in range(2):
        assert torch.allclose(total.solve().delta, once, atol=1e-6 * float(once.abs().max()))


@pytest.mark.parametrize(
    ("condition", "ridge", "quick"), [(2.0, 0.0, True), (30.0, 0.0, False), (30.0, 0.03, True), (1e6, 0.0, False)]
)
def test_products_in_float32_are_taken_only_where_the_inverse_is_benign(condition, ridge, quick):
    factor = global_pair(600, 30, 8, condition=condition).B
    found = inverse(factor, ridge, 1e-9)
    exact = reference_inverse(factor, ridge)
    assert found.quick is quick
    assert found.condition == pytest.approx(condition, rel=0.05)
    error = (found.left @ found.basis.double().T - exact).norm() / exact.norm()
    assert float(error) < (1e-5 if quick else 1e-7 * condition)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.03])
def test_the_quick_inverse_gives_what_the_exact_one_does(ridge):
    factor = global_pair(600, 30, 8, condition=4.0).B
    quick, exact = inverse(factor, ridge, 1e-6), inverse(factor, ridge, 1e-6, gram(factor.T))
    assert (quick.kept, quick.quick) == (exact.kept, exact.quick) == (8, True)
    assert quick.condition == pytest.approx(exact.condition, rel=1e-5)
    assert quick.amplification == pytest.approx(exact.amplification, rel=1e-5)
    assert torch.allclose(quick.left, exact.left, rtol=0, atol=1e-5 * float(exact.left.abs().max()))
    assert torch.allclose(quick.shrink, exact.shrink, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rcond", "kept"), [(0.2, 8), (0.5, 4), (1.0, 0)])
def test_a_cut_off_within_the_spectrum_is_not_for_the_quick_inverse(rcond, kept):
    factor = global_pair(600, 30, 8, condition=4.0).B
    found = inverse(factor, 0.0, rcond)
    assert found.kept == kept
    exact = inverse(factor, 0.0, rcond, gram(factor.T))
    assert torch.allclose(found.left, exact.left, rtol=0, atol=1e-5 * float(exact.left.abs().max()) + 1e-12)


def reference_inverse(factor, ridge):
    u, s, vt = torch.linalg.svd(factor.double(), full_matrices=False)
    return (vt.T * (s / (s.square() + ridge * s[0] ** 2))) @ u.T
