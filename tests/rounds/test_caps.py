"""How much one client may count for: shares and norms, against slow twins and against those who try."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.methods.table import build
from fedloom.records.config import FederationSettings
from fedloom.rounds.caps import USUAL, Caps, cap_shares, find_outliers, share_out
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import client_turn, server_turn
from toy import Federation, delta, job, step

SIZES = st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 10**9), min_size=1, max_size=9)


@given(SIZES, st.floats(0.01, 1.0))
def test_shares_sum_to_one_and_none_is_over_the_cap(examples: dict[str, int], most: float):
    shares, _ = share_out(examples, "examples", Caps(max_share=most))
    limit = max(most, 1 / len(examples))
    assert math.isclose(sum(shares.values()), 1.0, rel_tol=1e-9)
    assert max(shares.values()) <= limit + 1e-12
    below = [client for client in shares if shares[client] < limit * (1 - 1e-9)]
    ratios = [shares[client] / examples[client] for client in below]
    assert not ratios or max(ratios) <= min(ratios) * (1 + 1e-6), "who is not held counts in proportion"


@given(SIZES)
def test_what_no_cap_touches_is_the_plain_share_to_the_bit(examples: dict[str, int]):
    total = sum(map(float, examples.values()))
    shares, notes = share_out(examples, "examples", Caps())
    assert shares == {client: count / total for client, count in examples.items()} and not notes


def test_what_is_over_goes_to_the_others_until_nobody_is_over():
    assert cap_shares({"a": 0.8, "b": 0.15, "c": 0.05}, 0.4) == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2})
    assert cap_shares({"a": 0.9, "b": 0.1}, 0.3) == pytest.approx({"a": 0.5, "b": 0.5}), "of two each may have a half"
    assert cap_shares({"a": 1.0}, 1.0) == {"a": 1.0}


def test_the_operators_numbers_take_the_place_of_what_a_client_says():
    shares, notes = share_out({"bank": 10**9, "lab": 30}, "examples", Caps(client_examples={"bank": 10}))
    assert shares == {"bank": 0.25, "lab": 0.75} and not notes
    assert share_out({"bank": 7, "lab": 0}, "uniform", USUAL)[0] == {"bank": 0.5, "lab": 0.5}


def test_who_says_too_much_has_its_share_and_a_note():
    shares, notes = share_out({"bank": 10, "depot": 10, "lab": 980}, "examples", USUAL)
    assert shares == pytest.approx({"bank": 0.25, "depot": 0.25, "lab": 0.5})
    (note,) = notes
    assert "client lab says 980 examples, 98.0% of the round" in note and "federation.max_share is 0.5" in note


def test_the_usual_caps_are_those_of_the_settings():
    settings = FederationSettings()
    caps = Caps(settings.max_share, settings.client_examples, settings.max_norm, settings.max_norm_ratio)
    assert caps == USUAL


@pytest.mark.parametrize(
    ("norms", "out"),
    [
        ([2.7, 2.7e-6], []),  # of two nobody can say which is wrong
        ([2.7, 1e5], []),
        ([2.7, 2.5, 2.7e-6], []),  # tiny updates evict nobody
        ([2.7, 2.5, 2.7e-6, 2.7e-6], []),
        ([2.7, 2.5, 1e5], [2]),
        ([2.7, 0.0, 1e5], [2]),  # a zero does not switch the rule off
        ([2.7, 2.5, 0.0, 0.0, 0.0, 1e5, 2.6], [5]),
        ([2.7, 0.0, 0.0], []),
        ([0.0, 0.0, 0.0], []),
        ([1.0, 1.0, 150.0, 20000.0], [2, 3]),  # one outlier must not hide another
    ],
)
def test_only_what_is_out_of_all_proportion_is_an_outlier(norms: list[float], out: list[int]):
    assert sorted(find_outliers({str(i): norm for i, norm in enumerate(norms)}, USUAL)) == [str(i) for i in out]


@given(st.lists(st.floats(0, 1e12), max_size=9))
def test_what_is_left_has_no_outlier(norms: list[float]):
    named = {str(i): norm for i, norm in enumerate(norms)}
    found = find_outliers(named, USUAL)
    assert not find_outliers({client: norm for client, norm in named.items() if client not in found}, USUAL)


def sized(federation: Federation, client: str, size: float, examples: int) -> bytes:
    def train(state, round, seed):
        return Trained(step(state, round, seed, size=size).adapter, examples, 1.0)

    return client_turn(federation.job, client, federation.clients[client], [], train, 1).payload


def test_a_client_that_says_a_billion_examples_has_half_of_the_round():
    federation = Federation(replace(job(build("fedit")), caps=USUAL))
    payloads = {client: sized(federation, client, 0.1, 10) for client in ("ada", "bob")}
    payloads["cyd"] = sized(federation, "cyd", 0.1, 10**9)
    turn = server_turn(federation.job, federation.server, payloads, 1)
    assert not turn.refused and len(turn.notes) == 1 and "client cyd" in turn.notes[0]
    honest = server_turn(federation.job, federation.server, {c: payloads[c] for c in ("ada", "bob")}, 1).state
    alone = server_turn(federation.job, federation.server, {"cyd": payloads["cyd"]}, 1).state
    for name, tensor in turn.state.adapter.tensors().items():
        mean = (honest.adapter.tensors()[name] + alone.adapter.tensors()[name]) / 2
        assert torch.allclose(tensor, mean, atol=1e-6)


@pytest.mark.parametrize("method", ["flora", "flexlora", "fedsrd", "fedit"])
def test_a_tiny_update_of_one_of_two_evicts_nobody_in_any_engine(method: str):
    federation = Federation(replace(job(build(method)), caps=USUAL))
    payloads = {"ada": sized(federation, "ada", 0.1, 5), "bob": sized(federation, "bob", 1e-7, 5)}
    assert not server_turn(federation.job, federation.server, payloads, 1).refused


def test_a_huge_update_is_refused_in_the_round_itself():
    federation = Federation(replace(job(build("fedit")), caps=USUAL))
    payloads = {client: sized(federation, client, 0.1, 5) for client in ("ada", "bob")}
    before = server_turn(federation.job, federation.server, payloads, 1)
    for size, reason in ((1e3, "federation.max_norm_ratio is 100"), (1e8, "federation.max_norm is 1e+06")):
        turn = server_turn(federation.job, federation.server, {**payloads, "cyd": sized(federation, "cyd", size, 5)}, 1)
        assert set(turn.refused) == {"cyd"} and reason in turn.refused["cyd"]
        assert {m: d.tolist() for m, d in delta(turn.state.total).items()} == {
            m: d.tolist() for m, d in delta(before.state.total).items()
        }
