"""Clients that differ in rank, alpha, rsLoRA, patterns and modules: everything is combined in ΔW space."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_methods_contract import lossless, room

from fedloom.adapters.settings import AdapterSettings
from fedloom.lora.pair import digest, narrow
from fedloom.methods.table import METHODS, build
from fedloom.rounds.turns import Job
from toy import RANK, SHAPES, Federation, client_seed, delta, job

TEN = dict(zip("abcdefghij", [64, 32, 16, 16, 8, 8, 4, 4, 4, 4], strict=True))
WIDE = {"layers.0.k_proj": (24, 96), "layers.0.q_proj": (96, 96), "layers.1.down": (96, 130)}
SOME_ALPHA = {
    "ada": AdapterSettings(r=RANK, lora_alpha=16),
    "bob": AdapterSettings(r=RANK, lora_alpha=2, use_rslora=True),
    "cyd": AdapterSettings(r=RANK, lora_alpha=1, alpha_pattern={"q_proj": 32.0}),
}
SOME_RANK = {
    "ada": AdapterSettings(r=4, lora_alpha=16, rank_pattern={"down": 6}),
    "bob": AdapterSettings(r=2, lora_alpha=2, use_rslora=True, alpha_pattern={"k_proj": 5.0}),
    "cyd": AdapterSettings(r=3, lora_alpha=1, rank_pattern={r"layers\.0\.q_proj": 1}),
}
BUILDS = [(name, lossless(name)) for name in METHODS]
BUILDS += [("florist", {"tau": 1.0, "client_init": init}) for init in ("merge_reinit", "continue")]
UNEQUAL = [(name, settings) for name, settings in BUILDS if build(name, settings).facts.unequal_ranks]
every = pytest.mark.parametrize(("name", "settings"), BUILDS)
unequal = pytest.mark.parametrize(("name", "settings"), UNEQUAL)
weightings = pytest.mark.parametrize("weighting", ["examples", "uniform"])


def lossless_job(name: str, settings: dict, weighting: str) -> Job:
    method = build(name, settings)
    return job(method, weighting=weighting, budget=room(method))


def check_rounds(federation: Federation, rounds: int) -> None:
    """Exact methods give Σ p_k s_k B_k A_k; after each round everybody holds what the server holds, up to its rank."""
    method, uniform = federation.job.method, federation.job.weighting == "uniform"
    for round in range(1, rounds + 1):
        ideal, total = {}, 0
        for client, state in federation.clients.items():
            trained = federation.training(client)(state, round, client_seed(federation.job, client, round))
            count = 1 if uniform else trained.num_examples
            total += count
            after = delta(replace(state, adapter=trained.adapter).total)  # modules in W − W0, scales within
            ideal = {module: ideal.get(module, 0) + count * change for module, change in after.items()}
        federation.play()
        federation.settle()
        for module, after in delta(federation.server.total).items():
            wanted = ideal[module] / total
            if method.facts.exact:
                assert (after - wanted).norm() <= 1e-5 * wanted.norm(), (round, module)
        for client, state in federation.clients.items():
            own = narrow(federation.server.adapter, federation.ranks[client])
            assert digest(state.adapter) == digest(own), (round, client)
            assert digest(state.frozen) == digest(federation.server.frozen), (round, client)
            if method.facts.exact:
                for module, held in delta(state.total).items():
                    server = delta(federation.server.total)[module]
                    assert (held - server).norm() <= 1e-6 * server.norm(), (round, client, module)


@unequal
@weightings
def test_ranks_from_64_to_4_with_one_alpha(name: str, settings: dict, weighting: str):
    """Σ p s B A within 1e-5 for exact methods, s = 16 / r from 0.25 to 4; server and clients bit for bit for all."""
    adapters = {client: AdapterSettings(r=rank, lora_alpha=16) for client, rank in TEN.items()}
    ranks = {client: dict.fromkeys(WIDE, rank) for client, rank in TEN.items()}
    federation = Federation(lossless_job(name, settings, weighting), ranks, shapes=WIDE, settings=adapters)
    check_rounds(federation, 2)


@every
@weightings
def test_alphas_and_rslora_may_differ(name: str, settings: dict, weighting: str):
    federation = Federation(lossless_job(name, settings, weighting), settings=SOME_ALPHA)
    check_rounds(federation, 3)


@unequal
@weightings
def test_ranks_and_alphas_may_differ_by_module(name: str, settings: dict, weighting: str):
    ranks = {client: {module: own.rank(module) for module in SHAPES} for client, own in SOME_RANK.items()}
    assert ranks["ada"]["layers.1.down"] == 6 and ranks["cyd"]["layers.0.q_proj"] == 1
    federation = Federation(lossless_job(name, settings, weighting), ranks, settings=SOME_RANK)
    check_rounds(federation, 3)


def test_a_scale_changes_what_training_does_and_not_what_it_means():
    """The same inner step under twice the alpha is twice the change: the test above would see a forgotten scale."""
    changes = []
    for alpha in (4.0, 8.0):
        own = dict.fromkeys(["ada", "bob", "cyd"], AdapterSettings(r=RANK, lora_alpha=alpha))
        federation = Federation(job(build("flora")), settings=own)
        federation.play()
        changes.append(delta(federation.server.total))
    for module, change in changes[0].items():
        assert (changes[1][module] - 2 * change).norm() <= 1e-5 * change.norm()
