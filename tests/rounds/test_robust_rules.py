"""Geometry of updates and the rules that rest on it, against slow twins on dense matrices and against those who try."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.entries import dense_entry
from fedloom.lora.pair import LoraPair, LoraState, subset
from fedloom.methods.table import METHODS, build
from fedloom.rounds.checks import check_update
from fedloom.rounds.cohort import Cohort
from fedloom.rounds.decoded import Decoded
from fedloom.rounds.federation import Federation
from fedloom.rounds.geometry import find_change, gram_matrix
from fedloom.rounds.rules import (
    RULES,
    clip_factors,
    geometric_median,
    median_weights,
    mix_nearest,
    most_faults,
    multi_krum,
    trimmed,
)
from toy import CLIENTS_OF_SCALARS, built, delta, initial, job, random_state, ranks, step

CLIENTS = ["ada", "bob", "cyd", "dan"]


def moved(federation: Federation, name: str, seed: int) -> tuple[LoraState, bytes]:
    """A client's adapter after a made-up training, and the payload that it sends."""
    kept = {}

    def train(state, round, seed_given):
        method = federation.job.method
        trained = step(state, round, seed, parts=method.trainable(round), core=method.core(state))
        kept["after"] = subset(trained.adapter, federation.ranks[name])
        return replace(trained, adapter=kept["after"])

    payload = federation.client_turn(name, train)
    return kept["after"], payload


@pytest.mark.parametrize("name", [name for name in METHODS if name not in CLIENTS_OF_SCALARS])  # theirs: test_scalars
def test_the_gram_matrix_is_that_of_dense_changes(name: str):
    """In the second round, so that B is not zero, cores rest, and what was merged is no part of the change."""
    method = build(name, {"sparsity": 0.0}) if name == "fed-dare" else built(name)
    federation = Federation(job(method), initial(), dict.fromkeys(CLIENTS))
    federation.round({c: lambda s, r, seed: step(s, r, seed, parts=method.trainable(1)) for c in CLIENTS})
    sent, dense = {}, []
    federation.number += 1
    for seed, client in enumerate(CLIENTS):
        before = federation.clients[client].adapter
        after, sent[client] = moved(federation, client, seed)
        was, now = delta(before), delta(after)
        dense.append(torch.cat([(now[module] - was[module]).flatten() for module in sorted(now)]))
    facts = {c: check_update(federation.job, federation.server, c, sent[c], 2, Decoded(0)) for c in CLIENTS}
    cohort = Cohort(sent, dict.fromkeys(CLIENTS, 0.25), facts, Decoded(0))
    gram = gram_matrix(method, federation.server, cohort, CLIENTS)
    if method.takes_budget and name != "fed-dare":  # it sends a part of the change
        assert torch.equal(gram, gram.T) and bool((torch.linalg.eigvalsh(gram) > -1e-9).all())
        assert bool((gram.diagonal() > 0).all())
        return
    slow = torch.stack(dense) @ torch.stack(dense).T
    torch.testing.assert_close(gram, slow, rtol=2e-4, atol=1e-6)


def test_what_is_the_same_change_has_no_distance_whatever_its_factors():
    state = random_state(1)
    start = Federation(job(build("fedit")), state, dict.fromkeys(CLIENTS)).server
    twist = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)) + 3 * torch.eye(4)
    after = random_state(3)
    twisted = after.map(lambda pair: LoraPair(torch.linalg.inv(twist) @ pair.A, pair.B @ twist))
    changes = [
        find_change(build("fedit"), start, {name: dense_entry(t) for name, t in one.tensors().items()})
        for one in (after, twisted)
    ]
    one, other = (delta(change) for change in changes)
    for module in one:
        torch.testing.assert_close(one[module], other[module], rtol=1e-4, atol=1e-5)


def test_a_client_of_lower_rank_is_measured_on_its_own_components():
    federation = Federation(job(build("hetlora")), initial(), {"ada": ranks(4), "bob": ranks(2)})
    sent, dense = {}, []
    federation.number += 1
    for seed, client in enumerate(("ada", "bob")):
        before = federation.clients[client].adapter
        after, sent[client] = moved(federation, client, seed)
        dense.append(torch.cat([(delta(after)[m] - delta(before)[m]).flatten() for m in sorted(after)]))
    facts = {c: check_update(federation.job, federation.server, c, sent[c], 1) for c in sent}
    gram = gram_matrix(federation.job.method, federation.server, Cohort(sent, {}, facts, Decoded(0)), list(sent))
    torch.testing.assert_close(gram, torch.stack(dense) @ torch.stack(dense).T, rtol=1e-4, atol=1e-7)


POINTS = st.integers(0, 10_000).map(
    lambda seed: torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
)
MASSES = st.integers(0, 10_000).map(
    lambda seed: 0.2 + torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
)


@given(POINTS, MASSES)
@settings(max_examples=8)
def test_weiszfeld_from_the_gram_matrix_finds_the_geometric_median(points, masses):
    weights = median_weights(points @ points.T, masses)
    center = weights @ points

    def cost(at):
        return float((masses * (points - at).norm(dim=1)).sum())

    torch.testing.assert_close(float(weights.sum()), 1.0)
    for seed in range(8):
        away = 1e-3 * torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert cost(center) <= cost(center + away) + 1e-7


@given(POINTS, MASSES, st.permutations(range(7)))
@settings(max_examples=8)
def test_rules_are_shares_that_follow_the_clients_and_not_their_order(points, masses, order):
    for name, rule in RULES.items():
        faults = most_faults(name, 7)
        shares = rule(points @ points.T, masses, faults)
        assert float(shares.min()) >= 0 and abs(float(shares.sum()) - 1) < 1e-9
        turned = rule(points[order] @ points[order].T, masses[order], faults)
        torch.testing.assert_close(turned, shares[list(order)], rtol=1e-5, atol=1e-7)


@given(POINTS, st.floats(20, 1e4))
@settings(max_examples=8)
def test_two_liars_of_seven_far_away_move_a_rule_no_farther_than_honest_ones_do(points, size):
    masses = torch.ones(7, dtype=torch.float64)
    far = points.clone()
    far[:2] = size * torch.nn.functional.normalize(points[:2], dim=1)
    spread = float(points[2:].norm(dim=1).max())
    for rule in (geometric_median, trimmed, multi_krum):
        shares = rule(far @ far.T, masses, 2)
        assert float((shares @ far).norm()) <= 4 * spread, rule.__name__
    assert float(trimmed(far @ far.T, masses, 2)[:2].sum()) == 0.0


@given(POINTS, st.floats(5, 1e4))
@settings(max_examples=8)
def test_mixed_updates_have_the_mean_of_the_honest_ones_where_liars_are_far(points, size):
    """Everybody's nearest are then the honest ones. The median alone counts those less that differ."""
    far, masses = points.clone(), torch.ones(7, dtype=torch.float64)
    far[:2] = points.norm() * size * torch.nn.functional.normalize(points[:2] + 1, dim=1)
    honest, gram = far[2:].mean(dim=0), far @ far.T
    torch.testing.assert_close(geometric_median(gram, masses, 2) @ far, honest, rtol=1e-3, atol=1e-3)
    assert float((median_weights(gram, masses) @ far - honest).norm()) > 0.01


def test_everybody_is_mixed_with_itself_by_mass():
    mixing = mix_nearest(torch.diag(torch.tensor([1.0, 4.0, 9.0])), torch.tensor([1.0, 2.0, 3.0]), 1)
    torch.testing.assert_close(mixing, torch.tensor([[1 / 3, 2 / 3, 0.0], [1 / 3, 2 / 3, 0.0], [0.25, 0.0, 0.75]]))


@given(st.lists(st.floats(0.1, 1e6), min_size=3, max_size=9), st.floats(1, 10))
def test_no_share_times_norm_is_over_the_bound(norms, ratio):
    factors = clip_factors(norms, ratio)
    middle = sorted(norms)[len(norms) // 2]
    assert all(f * norm <= ratio * middle * (1 + 1e-9) for f, norm in zip(factors, norms, strict=True))
    assert all(f == 1.0 for f, norm in zip(factors, norms, strict=True) if norm <= ratio * middle)
    assert clip_factors(norms[:2], ratio) == [1.0, 1.0]


def test_updates_of_zeros_are_no_measure_for_the_others():
    assert clip_factors([0.0, 0.0, 0.0, 1.0, 30.0], 2.0) == [1.0, 1.0, 1.0, 1.0, 1.0]
    assert clip_factors([0.0, 0.0, 0.0], 2.0) == [1.0, 1.0, 1.0]
