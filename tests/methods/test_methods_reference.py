"""Whole rounds against dense float64 twins: non-square modules, unequal weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import reference_methods as reference
from fedloom.compress.entries import to_dense
from fedloom.lora.pair import LoraState
from fedloom.methods.table import build
from fedloom.wire import decode
from toy import RANK, SHAPES, Federation, client_seed, delta, job

PAPER = {"preset": "paper", "step_guard": False}
UNEQUAL = {"ada": 4, "bob": 2, "cyd": 1}


def arrays(state: LoraState, module: str) -> reference.Pair:
    return state[module].A.double().numpy(), state[module].B.double().numpy()


def shares_and_trained(federation: Federation) -> tuple[list[float], list[LoraState], LoraState]:
    """What the next round's clients will have trained, and their shares: the toy step is a function of the seed."""
    federation.settle()
    job, round = federation.job, federation.number + 1
    trained = [federation.train(federation.clients[c], round, client_seed(job, c, round)) for c in federation.clients]
    total = sum(t.num_examples for t in trained)
    return [t.num_examples / total for t in trained], [t.adapter for t in trained], federation.server.adapter


def test_weights_are_unequal():
    shares, _, _ = shares_and_trained(Federation(job(build("fedit"))))
    assert len({round(share, 6) for share in shares}) > 1 and sum(shares) == pytest.approx(1.0)


def test_fedit_is_the_mean_of_the_factors():
    federation = Federation(job(build("fedit")))
    for _ in range(3):
        shares, trained, _ = shares_and_trained(federation)
        federation.play()
        for module in SHAPES:
            a, b = reference.fedit([arrays(state, module) for state in trained], shares)
            np.testing.assert_allclose(federation.server.adapter[module].A.numpy(), a, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(federation.server.adapter[module].B.numpy(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("client_init", ["merge_reinit", "continue", "warm"])
def test_florist_is_the_truncated_sum_of_products(tau: float, client_init: str):
    federation = Federation(job(build("florist", {"tau": tau, "client_init": client_init, "step_guard": False})))
    for _ in range(3):
        shares, trained, _ = shares_and_trained(federation)
        frozen = {m: w.numpy() for m, w in delta(federation.server.fixed).items()}
        federation.play()
        for module in SHAPES:
            expected = reference.florist([arrays(state, module) for state in trained], shares, tau)
            kept = RANK if client_init == "continue" else min(SHAPES[module])
            u, s, vt = np.linalg.svd(expected)
            expected = (u[:, :kept] * s[:kept]) @ vt[:kept] + frozen.get(module, 0)
            actual = delta(federation.server.total)[module].numpy()
            np.testing.assert_allclose(actual, expected, atol=2e-5 * np.linalg.norm(expected))


@pytest.mark.parametrize(("name", "rank"), [("fedsrd", RANK), ("fedsrd-e", None)])
def test_fedsrd_is_the_dense_rule_of_the_paper(name: str, rank: int | None):
    settings = {**PAPER, "download_sparsity": 0.0}
    federation = Federation(job(build(name, settings)))
    for number in range(1, 5):
        shares, trained, before = shares_and_trained(federation)
        federation.play()
        part = "B" if number % 2 else "A"
        broadcast = decode(federation.broadcasts[-1]).entries
        assert {entry.rpartition("/")[2] for entry in broadcast} == {part}
        for module in SHAPES:
            old = arrays(before, module)
            sent = [reference.sparsified(old, arrays(state, module)) for state in trained]
            expected = reference.fedsrd_change(old, sent, shares, part, rank)
            actual = to_dense(broadcast[f"{module}/{part}"]).numpy()
            np.testing.assert_allclose(actual, expected, atol=2e-4 * max(np.linalg.norm(expected), 1e-6))


@pytest.mark.parametrize(("name", "rank"), [("fedsrd", RANK), ("fedsrd-e", None)])
def test_fedsrd_with_unequal_ranks_is_the_dense_rule_on_whole_pairs(name: str, rank: int | None):
    """A client of lower rank has the server's other components as they are: its change of them is zero."""
    federation = Federation(job(build(name, {**PAPER, "download_sparsity": 0.0})), UNEQUAL)
    for number in range(1, 5):
        shares, trained, before = shares_and_trained(federation)
        held = [state.adapter for state in federation.clients.values()]
        federation.play()
        part = "B" if number % 2 else "A"
        broadcast = decode(federation.broadcasts[-1]).entries
        for module in SHAPES:
            old = arrays(before, module)
            sent = [
                reference.sparsified(arrays(own, module), arrays(after, module))
                for own, after in zip(held, trained, strict=True)
            ]
            wide = [reference.widened(old, change) for change in sent]
            expected = reference.fedsrd_change(old, wide, shares, part, rank)
            actual = to_dense(broadcast[f"{module}/{part}"]).numpy()
            np.testing.assert_allclose(actual, expected, atol=2e-4 * max(np.linalg.norm(expected), 1e-6))


def after_round(name: str, settings: dict | None = None) -> Iterator[tuple[Federation, LoraState, list, list[float]]]:
    """Three rounds at unequal ranks: the federation, the server's adapter before, module → whole pairs, shares."""
    federation = Federation(job(build(name, settings)), UNEQUAL)
    for _ in range(3):
        shares, trained, before = shares_and_trained(federation)
        federation.play()
        whole = {m: [reference.held(arrays(before, m), arrays(own, m)) for own in trained] for m in SHAPES}
        yield federation, before, whole, shares


@pytest.mark.parametrize("name", ["ffa", "rolora"])
def test_means_of_one_factor_with_unequal_ranks_are_those_of_whole_factors(name: str):
    for federation, _, whole, shares in after_round(name):
        for module in SHAPES:
            a, b = reference.fedit(whole[module], shares)
            np.testing.assert_allclose(federation.server.adapter[module].A.numpy(), a, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(federation.server.adapter[module].B.numpy(), b, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(b @ a, reference.product(whole[module], shares), atol=1e-6)


def test_fedsvd_and_fedex_with_unequal_ranks_are_the_mean_of_the_models():
    for name in ("fedsvd", "fedex"):
        merged = dict.fromkeys(SHAPES, 0.0)
        for federation, _, whole, shares in after_round(name):
            for module in SHAPES:
                expected = reference.product(whole[module], shares) + merged[module]
                actual = delta(federation.server.total)[module].numpy()
                np.testing.assert_allclose(actual, expected, atol=1e-5 * np.linalg.norm(expected))
                if name == "fedex":
                    merged[module] = delta(federation.server.frozen)[module].numpy()


def test_lora_fair_and_flora_na_with_unequal_ranks_are_their_least_squares():
    for federation, _, whole, shares in after_round("lora-fair", {"ridge": 0.05}):
        for module in SHAPES:
            a, b = reference.lora_fair(whole[module], shares, 0.05)
            np.testing.assert_allclose(federation.server.adapter[module].A.numpy(), a, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(federation.server.adapter[module].B.numpy(), b, rtol=1e-4, atol=1e-5)
    for federation, _, whole, shares in after_round("flora-na"):
        for module in SHAPES:
            expected = reference.flora_na(whole[module], shares, 20)
            actual = delta(federation.server.adapter)[module].numpy()
            np.testing.assert_allclose(actual, expected, atol=1e-4 * np.linalg.norm(expected))


def test_changes_with_unequal_ranks_are_averaged_with_zeros_for_what_a_client_does_not_train():
    """Fed-DARE without dropping adds their mean; FLASC with all elements takes its Adam step by it."""
    first: dict = {}
    second: dict = {}
    dense = {"upload_density": 1.0, "download_density": 1.0, "server_learning_rate": 0.1}
    for name, settings in (("fed-dare", {"sparsity": 0.0}), ("flasc", dense)):
        for federation, before, whole, shares in after_round(name, settings):
            for module in SHAPES:
                means = reference.fedit(whole[module], shares)
                for part, old, mean in zip("AB", arrays(before, module), means, strict=True):
                    change = mean - old
                    if name == "flasc":
                        key = module, part
                        first[key] = 0.9 * first.get(key, 0.0) + 0.1 * change
                        second[key] = 0.999 * second.get(key, 0.0) + 0.001 * change**2
                        change = 0.1 * first[key] / (np.sqrt(second[key]) + 1e-3)
                    actual = federation.server.adapter[module].part(part).numpy()
                    np.testing.assert_allclose(actual, old + change, rtol=1e-4, atol=1e-5)


def test_fedsrd_begins_with_b_since_a_change_of_a_would_do_nothing():
    federation = Federation(job(build("fedsrd", PAPER)))
    federation.play()
    assert any(change.abs().max() > 0 for change in delta(federation.server.total).values())


def test_what_travels_down_is_dropped_at_random_and_rescaled():
    dense = Federation(job(build("fedsrd-e", {**PAPER, "download_sparsity": 0.0})))
    thinned = Federation(job(build("fedsrd-e", {**PAPER, "download_sparsity": 0.75})))
    dense.play()
    thinned.play()
    full = {name: to_dense(entry) for name, entry in decode(dense.broadcasts[0]).entries.items()}
    kept = {name: to_dense(entry) for name, entry in decode(thinned.broadcasts[0]).entries.items()}
    for name, tensor in kept.items():
        np.testing.assert_allclose(tensor[tensor != 0].numpy(), 4 * full[name][tensor != 0].numpy(), rtol=1e-5)
    share = sum(int((t != 0).sum()) for t in kept.values()) / sum(int((t != 0).sum()) for t in full.values())
    assert 0.1 < share < 0.45
