"""Ferret: coordinates of the clients' changes along drawn orthonormal directions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedloom.compress.entries import Dense, Seeded, dense_entry, to_dense
from fedloom.compress.masks import seeded_mask
from fedloom.compress.rotate import rotate, rotate_back
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState
from fedloom.methods.ferret import seed_of
from fedloom.methods.table import build
from fedloom.rounds.checks import check_update
from fedloom.rounds.cohort import Cohort
from fedloom.rounds.decoded import Decoded
from fedloom.rounds.geometry import gram_matrix
from fedloom.rounds.turns import client_turn, server_turn, start
from fedloom.wire import decode, encode
from toy import Federation, client_seed, initial, job, trainer


def played(**settings):
    """One round: the federation, and client → its change of every tensor."""
    run = Federation(job(build("ferret", settings)))
    begun, run.first = run.server.adapter.tensors(), run.server
    done = {c: run.train(run.server, 1, client_seed(run.job, c, 1)) for c in run.clients}
    run.play()
    changes = {c: {n: t - begun[n] for n, t in trained.adapter.tensors().items()} for c, trained in done.items()}
    whole = sum(trained.num_examples for trained in done.values())
    mean = {n: sum(done[c].num_examples / whole * changes[c][n] for c in done) for n in begun}
    return run, begun, changes, mean


def test_with_all_coordinates_the_step_is_the_mean():
    run, begun, _, mean = played(preset="lossless")
    for name, tensor in run.server.adapter.tensors().items():
        assert torch.allclose(tensor - begun[name], mean[name], atol=1e-5)


@pytest.mark.parametrize(("share", "rate"), [(0.25, 1.0), (0.5, 2.0)])
def test_the_step_is_the_means_projection_made_longer(share: float, rate: float):
    run, begun, _, mean = played(share=share, server_learning_rate=rate)
    for name, tensor in run.server.adapter.tensors().items():
        seed = seed_of(run.first, name)
        turned = rotate(mean[name].flatten(), seed) * seeded_mask(mean[name].numel(), share, seed)
        wanted = rotate_back(turned, seed).view_as(tensor) * rate / share**0.5
        assert torch.allclose(tensor - begun[name], wanted, atol=1e-5)


def test_a_step_is_about_as_long_as_the_mean_change():
    run, begun, _, mean = played(share=0.3, server_learning_rate=1.0)
    moved = torch.cat([(tensor - begun[name]).flatten() for name, tensor in run.server.adapter.tensors().items()])
    length = torch.cat([tensor.flatten() for tensor in mean.values()]).norm()
    assert float(moved.norm() / length) == pytest.approx(1.0, abs=0.25)


def test_over_many_rounds_every_direction_has_its_turn():
    """The mean over seeds of the projection is the share of the vector: nothing is left out for good."""
    flat, share = torch.randn(40, generator=torch.Generator().manual_seed(1)), 0.25
    total = torch.zeros(40)
    for seed in range(2000):
        total += rotate_back(rotate(flat, seed) * seeded_mask(40, share, seed), seed)
    assert torch.allclose(total / 2000, share * flat, atol=0.08)


def test_a_payload_names_seeds_and_no_places():
    run, *_ = played(share=0.25)
    for payload in [*run.uploads.values(), run.broadcasts[-1]]:
        entries = decode(payload).entries
        assert set(entries) == set(run.server.adapter.tensors())
        for name, entry in entries.items():
            assert isinstance(entry, Seeded) and entry.density == 0.25
            assert entry.seed == seed_of(run.first, name)


def test_a_budget_takes_the_place_of_the_share():
    run = Federation(job(build("ferret"), values="int8", budget=450))
    run.play()
    for payload in run.uploads.values():
        assert 400 < len(payload) <= 450
    sent = {entry.density for p in run.uploads.values() for entry in decode(p).entries.values()}
    down = {entry.density for entry in decode(run.broadcasts[-1]).entries.values()}
    assert down == {max(sent)}


def test_rules_on_updates_see_the_changes_and_not_their_coordinates():
    """Inner products of what coordinates stand for, held against those of Fed-IT's kind of entries."""
    grams = []
    for name, settings in (("ferret", {"preset": "lossless"}), ("fed-dare", {"sparsity": 0.0})):
        run = Federation(job(build(name, settings)))
        for _ in range(2):
            run.play()
        run.settle()
        payloads = {c: run.client_turn(c, run.training(c)) for c in run.clients}
        facts = {c: check_update(run.job, run.server, c, p, 3 - 1) for c, p in payloads.items()}
        cohort = Cohort(payloads, {}, facts, Decoded.beside(run.server))
        grams.append(gram_matrix(run.job.method, run.server, cohort, list(payloads)))
    assert torch.allclose(grams[0], grams[1], rtol=1e-3, atol=1e-6)


def test_an_entry_without_directions_is_refused_by_its_clients_name():
    run = job(build("ferret"))
    begin = start(run, initial())
    train = trainer(run.method)
    payloads = {c: client_turn(run, c, begin, (), train, 1).payload for c in ("ada", "bob")}
    message = decode(payloads["ada"])
    dense = {name: dense_entry(to_dense(entry)) for name, entry in message.entries.items()}
    assert all(isinstance(entry, Dense) for entry in dense.values())
    payloads["ada"] = encode(replace(message, entries=dense))
    turn = server_turn(run, begin, payloads, 1)
    assert list(turn.refused) == ["ada"] and "names none" in turn.refused["ada"]
    assert isinstance(turn.state.adapter, LoraState)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"share": 0.0}, "method.share is 0"),
        ({"share": 1.5}, "method.share is 1.5"),
        ({"server_learning_rate": 0.0}, "method.server_learning_rate is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], match: str):
    with pytest.raises(ConfigError, match=match):
        build("ferret", settings)
