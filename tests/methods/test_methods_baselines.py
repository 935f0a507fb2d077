"""Identities of single methods, and the known faults of released implementations as regressions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom.compress.entries import Sparse, dense_entry, to_dense
from fedloom.errors import ConfigError, RoundError
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.flora_na import coefficients
from fedloom.methods.method import State
from fedloom.methods.table import METHODS, build
from fedloom.rounds.job import sender_digest
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import server_turn
from fedloom.wire import Message, decode, encode, read_header
from toy import RANK, SHAPES, Federation, client_seed, delta, initial, job, random_state, trainer


def ideal(federation: Federation) -> dict[str, torch.Tensor]:
    """Σ p_k B_k A_k of the coming round, dense in float64 (without merged increments)."""
    federation.settle()
    round = federation.number + 1
    trained = [federation.train(s, round, client_seed(federation.job, c, round)) for c, s in federation.clients.items()]
    total = sum(t.num_examples for t in trained)
    return {m: sum(t.num_examples / total * delta(t.adapter)[m] for t in trained) for m in SHAPES}


def error(federation: Federation, target: dict[str, torch.Tensor]) -> float:
    got = delta(federation.server.adapter)
    return sum(float((got[m] - target[m]).norm() ** 2) for m in SHAPES) ** 0.5


@pytest.mark.parametrize(("better", "worse"), [("lora-fair", "fedit"), ("flora-na", "fedit"), ("flexlora", "flora-na")])
def test_corrections_come_nearer_to_the_ideal(better: str, worse: str):
    errors = []
    for name in (better, worse):
        federation = Federation(job(build(name)))
        target = ideal(federation)
        federation.play()
        errors.append(error(federation, target))
    assert errors[0] < errors[1]


@pytest.mark.parametrize(("settings", "most"), [({}, 5.0), ({"rescale_step": 3.0}, 3.0), ({"preset": "paper"}, None)])
def test_few_elements_of_fedsrd_go_no_further_than_it_says(settings: dict[str, object], most: float | None):
    draw = torch.Generator().manual_seed(0)
    before, moved = (LoraPair(torch.randn(4, 90, generator=draw), torch.randn(70, 4, generator=draw)) for _ in "ab")
    after = LoraState({"m": LoraPair(before.A + moved.A, before.B + moved.B)})
    few = build("fedsrd", {"base_sparsity": 0.98, "sparsity_upper": 0.0, **settings})
    _, entries = few.compress(State(LoraState({"m": before})), after, job(few).context(1, "ada"))
    for name, entry in entries.items():
        length = float(to_dense(entry).norm() / moved.part(name[-1]).norm())
        assert length == pytest.approx(most, rel=1e-4) if most else length > 5.01


@pytest.mark.parametrize("settings", [{"rescale_step": 0.5}, {"rescale_cap": 0.5}])
def test_fedsrd_lengthens_and_never_shortens(settings: dict[str, float]):
    with pytest.raises(ConfigError, match="must be ≥ 1"):
        build("fedsrd", settings)


def test_lora_fair_with_an_endless_ridge_is_fedit():
    fair, plain = Federation(job(build("lora-fair", {"ridge": 1e9}))), Federation(job(build("fedit")))
    for federation in (fair, plain):
        federation.play()
    for module, change in delta(plain.server.total).items():
        torch.testing.assert_close(delta(fair.server.total)[module], change, rtol=1e-4, atol=1e-6)


def test_flora_na_solves_the_small_problem_as_a_dense_solver_does():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(3, 2, 7, generator=generator), torch.randn(3, 5, 2, generator=generator)
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    u, v = coefficients(a, b, shares, sweeps=200)
    target = sum(p * y.double() @ x.double() for p, x, y in zip(shares, a, b, strict=True))

    def loss(u: np.ndarray, v: np.ndarray) -> float:
        left, right = np.einsum("k,kmr->mr", u, b.double().numpy()), np.einsum("k,krn->rn", v, a.double().numpy())
        return float(((left @ right - target.numpy()) ** 2).sum())

    best = loss(u.numpy(), v.numpy())
    assert best < loss(shares.numpy(), shares.numpy())
    rng = np.random.default_rng(0)
    for _ in range(200):  # a minimum: no small step lowers the loss
        step = 1e-4 * rng.standard_normal((2, 3))
        assert loss(u.numpy() + step[0], v.numpy() + step[1]) >= best - 1e-9


def test_fedsvd_leaves_the_product_and_makes_the_rows_of_a_orthonormal():
    turned, plain = Federation(job(build("fedsvd"))), Federation(job(build("ffa")))
    for federation in (turned, plain):
        federation.play()
    for module, change in delta(plain.server.total).items():
        torch.testing.assert_close(delta(turned.server.total)[module], change, rtol=1e-4, atol=1e-6)
        a = turned.server.adapter[module].A
        torch.testing.assert_close(a @ a.T, torch.eye(RANK), rtol=0, atol=1e-5)


def test_fedsvd_keeps_a_while_b_is_zero():
    federation = Federation(job(build("fedsvd")), train=lambda s, r, k: Trained(s.adapter, 1, 0.0))
    federation.play()
    for module, pair in initial().items():
        assert torch.equal(federation.server.adapter[module].A, pair.A)


def test_ffa_never_moves_a_and_sends_b_alone():
    federation = Federation(job(build("ffa")))
    for _ in range(3):
        federation.play()
    for payload in [*federation.broadcasts, *federation.uploads.values()]:
        assert {name.rpartition("/")[2] for name in decode(payload).entries} == {"B"}
    for module, pair in initial().items():
        assert torch.equal(federation.server.adapter[module].A, pair.A)


def test_rolora_sends_b_first_then_a():
    federation = Federation(job(build("rolora")))
    parts = []
    for _ in range(4):
        federation.play()
        parts.append({name.rpartition("/")[2] for name in decode(federation.broadcasts[-1]).entries})
    assert parts == [{"B"}, {"A"}, {"B"}, {"A"}]


def test_the_downloads_of_flora_grow_with_the_ranks_and_are_not_attenuated_by_the_number_of_clients():
    few, many = (Federation(job(build("flora")), dict.fromkeys(names, 2)) for names in ("ab", "abcd"))
    for federation in (few, many):
        target = ideal(federation)
        federation.play()
        for module in SHAPES:
            torch.testing.assert_close(delta(federation.server.total)[module], target[module], rtol=1e-4, atol=1e-6)
    entries = decode(many.broadcasts[0]).entries
    assert {entry.shape[0] for name, entry in entries.items() if name.endswith("_A")} == {8}


def test_the_residual_of_fedex_travels_as_factors_of_the_least_rank():
    federation = Federation(job(build("fedex")), {"ada": 2, "bob": 2})
    federation.play()
    for name, entry in decode(federation.broadcasts[0]).entries.items():
        if name.endswith("/frozen_A"):
            assert entry.shape[0] <= 2  # (K − 1) r


def test_hetlora_weighs_by_the_size_of_the_change():
    def train(state: State, round: int, seed: int) -> Trained:
        size = 1.0 if seed == client_seed(federation.job, "ada", 1) else 1e-4
        return Trained(random_state(seed, size=size), 1, 0.0)

    federation = Federation(job(build("hetlora")), train=train)
    federation.play()
    ada = random_state(client_seed(federation.job, "ada", 1), size=1.0)
    for module, change in delta(ada).items():
        torch.testing.assert_close(delta(federation.server.total)[module], change, rtol=1e-2, atol=1e-3)


def test_fed_dare_is_unbiased():
    method, after = build("fed-dare", {"sparsity": 0.5}), random_state(9)
    sums = {module: torch.zeros_like(pair.B) for module, pair in after.items()}
    for seed in range(300):
        federation = Federation(job(method, seed=seed), {"ada": RANK}, train=lambda s, r, k: Trained(after, 1, 0.0))
        federation.play()
        for module, total in sums.items():
            total += federation.server.adapter[module].B / 300
    for module, mean in sums.items():
        assert not torch.allclose(federation.server.adapter[module].B, after[module].B)
        assert bool(((mean - after[module].B).abs() <= 5 * after[module].B.abs() / 300**0.5).all())


def test_flasc_broadcasts_the_largest_elements_and_keeps_the_rest_to_itself():
    federation = Federation(job(build("flasc", {"download_density": 0.25})))
    federation.play()
    for name, entry in decode(federation.broadcasts[0]).entries.items():
        assert isinstance(entry, Sparse)
        theta = federation.server.memory[f"theta/{name}"].flatten()
        kept = to_dense(entry).flatten()
        assert entry.positions.numel() == round(0.25 * theta.numel())
        assert theta[entry.positions].abs().min() >= theta[kept == 0].abs().max()


def test_flasc_measures_change_from_the_masked_download():
    """A client that does not train has changed nothing, although it holds a quarter of the server's adapter only."""
    federation = Federation(job(build("flasc", {"download_density": 0.25})))
    federation.play()
    federation.train = lambda state, round, seed: Trained(state.adapter, 1, 0.0)
    federation.play()
    for payload in federation.uploads.values():
        assert all(entry.positions.numel() == 0 for entry in decode(payload).entries.values())


def test_fedprox_pulls_towards_the_global_adapter():
    penalty = build("fedprox", {"mu": 0.5}).penalty
    before, now = random_state(1), random_state(2)
    expected = 0.25 * sum(float((now.tensors()[n] - t).square().sum()) for n, t in before.tensors().items())
    assert float(penalty(before, now)) == pytest.approx(expected, rel=1e-5)
    assert float(penalty(before, before)) == 0.0


def test_the_mean_without_momentum_is_fedavg():
    plain = Federation(job(build("fedit")))
    same = Federation(job(build("fedit", {"server_optimizer": "fedavgm", "server_momentum": 0.0})))
    for federation in (plain, same):
        for _ in range(2):
            federation.play()
    for module, change in delta(plain.server.total).items():
        torch.testing.assert_close(delta(same.server.total)[module], change, rtol=1e-4, atol=1e-6)


def test_server_optimisers_follow_their_recurrences():
    settings = {"server_optimizer": "fedadam", "server_learning_rate": 0.1, "server_tau": 0.01}
    federation = Federation(job(build("fedit", settings)))
    first = second = 0.0
    for _ in range(3):
        plain = Federation(job(build("fedit")))
        federation.settle()
        plain.clients, plain.server, plain.number = dict(federation.clients), federation.server, federation.number
        plain.broadcasts = list(federation.broadcasts)
        before = federation.server.adapter["layers.1.down"].A
        plain.play()
        federation.play()
        change = plain.server.adapter["layers.1.down"].A - before
        first, second = 0.9 * first + 0.1 * change, 0.99 * second + 0.01 * change**2
        expected = before + 0.1 * first / (second**0.5 + 0.01)
        torch.testing.assert_close(federation.server.adapter["layers.1.down"].A, expected)


def test_a_server_optimiser_over_a_method_without_a_mean_is_refused():
    with pytest.raises(ConfigError, match="florist"):
        build("florist", {"server_optimizer": "fedadam"})


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("fedsrdd", {}, "fedsrd"),
        ("fedsrd", {"rigde": 1.0}, "ridge"),
        ("fedsrd", {"preset": "papre"}, "paper"),
        ("fedsrd", {"base_sparsity": "much"}, "base_sparsity"),
        ("florist", {"tau": 1.5}, "tau"),
        ("florist", {"client_init": "cold"}, "client_init"),
    ],
)
def test_wrong_settings_name_what_was_meant(name: str, settings: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        build(name, settings)


# --- faults of released code -------------------------------------------------------------------------------------


def test_a_sparse_method_sends_no_zeros():
    """FedSRD's release sends its sparse tensors dense."""
    sizes = {}
    for sparsity in (0.5, 0.85):
        federation = Federation(job(build("fedsrd", {"base_sparsity": sparsity, "kurtosis_slope": 0.0})))
        federation.play()
        for entry in decode(federation.uploads["ada"]).entries.values():
            assert isinstance(entry, Sparse)
            assert entry.positions.numel() == max(1, round((1 - sparsity) * to_dense(entry).numel()))
            assert bool((entry.values != 0).all())
        sizes[sparsity] = len(federation.uploads["ada"])
    assert sizes[0.85] < 0.6 * sizes[0.5]


def test_no_client_is_counted_twice():
    """FLoRIST's release counts client 0 twice: with one client of two moving, the aggregate is its share exactly."""

    def train(state: State, round: int, seed: int) -> Trained:
        moves = seed == client_seed(federation.job, "ada", 1)
        return Trained(random_state(5) if moves else state.adapter, 1, 0.0)

    federation = Federation(job(build("florist", {"tau": 1.0})), {"ada": RANK, "bob": RANK}, train=train)
    federation.play()
    for module, change in delta(random_state(5)).items():
        torch.testing.assert_close(delta(federation.server.total)[module], change / 2, rtol=1e-4, atol=1e-7)


def test_a_stack_whose_height_equals_a_rank_is_not_scaled_again():
    """FLoRIST's release re-scales the stack when its row count happens to equal a client's rank ([4, 8, 16, 8])."""
    clients = {"a": 1, "b": 2, "c": 4, "d": 2}  # the first three stack to a height of 7, the first two to 3, …
    federation = Federation(job(build("florist", {"tau": 1.0})), {**clients, "e": 3})
    target = ideal(federation)
    federation.play()
    for module in SHAPES:
        torch.testing.assert_close(delta(federation.server.total)[module], target[module], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(n for n in METHODS if build(n).facts.unequal_ranks))
def test_serving_a_client_of_low_rank_does_not_harm_the_others(name: str):
    """FLoRIST's release overwrites the global file while it hands it to a low-rank client."""
    federation = Federation(job(build(name)), {"high": 4, "low": 1})
    for _ in range(3):
        federation.play()
        before = federation.broadcasts[-1]
        federation.missed("low")
        assert federation.broadcasts[-1] == before and read_header(before).kind == "change"
    federation.settle()
    assert set(federation.clients["high"].adapter.ranks().values()) == {4}


@pytest.mark.parametrize("name", ["fedit", "florist", "flexlora", "flora"])
def test_components_that_are_padded_can_still_train(name: str):
    """Rows of A that are zero beside columns of B that are zero would have no gradient for ever."""
    settings = {"client_init": "continue"} if name == "florist" else {}
    federation = Federation(job(build(name, settings)), {"ada": 1, "bob": 1, "max": 4})
    federation.play(["ada", "bob"])
    federation.settle()
    for module, pair in federation.clients["max"].adapter.items():
        alive = (pair.A.norm(dim=1) > 0) | (pair.B.norm(dim=0) > 0)
        assert bool(alive.all()), module


def test_flexlora_sends_each_client_the_best_approximation_of_its_rank():
    federation = Federation(job(build("flexlora")), {"high": 4, "low": 2})
    target = ideal(federation)
    federation.play()
    federation.settle()
    for module, whole in target.items():
        u, s, vt = np.linalg.svd(whole.numpy())
        for client, rank in {"high": 4, "low": 2}.items():
            best = (u[:, :rank] * s[:rank]) @ vt[:rank]
            got = delta(federation.clients[client].adapter)[module].numpy()
            np.testing.assert_allclose(got, best, atol=1e-5 * np.linalg.norm(whole))


def test_alpha_is_part_of_the_update_not_of_the_average():
    """A client with twice the scale and half of B has changed the model by the same."""

    def scaled(factor: float):
        def train(state: State, round: int, seed: int) -> Trained:
            trained = trainer(method)(state, round, seed)
            return replace(
                trained,
                adapter=LoraState({m: LoraPair(p.A / factor, p.B * factor) for m, p in trained.adapter.items()}),
            )

        return train

    method = build("florist", {"tau": 1.0})
    one, two = (Federation(job(method), train=scaled(factor)) for factor in (1.0, 2.0))
    for federation in (one, two):
        federation.play()
    for module, change in delta(one.server.total).items():
        torch.testing.assert_close(delta(two.server.total)[module], change, rtol=1e-4, atol=1e-6)


def test_fed_sb_sends_r_squared_values_and_averages_exactly():
    """From the second round on the broadcast product is Σ p_k U R_k V, and nothing else of the model changes."""
    federation = Federation(job(build("fed-sb")))
    federation.play()
    first = federation.server
    assert all(torch.count_nonzero(pair.B @ pair.A) == 0 for pair in first.adapter.values())
    for _ in range(2):
        target = ideal(federation)
        federation.play()
        for name, entry in decode(federation.uploads["ada"]).entries.items():
            assert name.endswith("/R") and entry.shape == (RANK, RANK)
        for module, change in delta(federation.server.adapter).items():
            torch.testing.assert_close(change, target[module], rtol=1e-5, atol=1e-7)
        assert federation.server.frozen is first.frozen


def test_fed_sb_rests_on_the_leading_components_of_the_first_round():
    federation = Federation(job(build("fed-sb", {"scale": 2.0})))
    target = ideal(federation)
    federation.play()
    core = federation.job.method.core(federation.server)
    for module, product in target.items():
        u, s, vt = np.linalg.svd(product.numpy(), full_matrices=False)
        pair = core[module]
        assert np.allclose(np.abs(u[:, :RANK].T @ pair.B.numpy()), 2 * np.eye(RANK), atol=1e-4)
        assert np.allclose(np.abs(vt[:RANK] @ pair.A.numpy().T), np.eye(RANK), atol=1e-4)
        merged = delta(federation.server.frozen)[module].numpy()
        assert np.allclose(merged, (u[:, :RANK] * s[:RANK]) @ vt[:RANK], atol=1e-5)


def test_fed_sb_goes_on_with_lora_where_nobody_answered_in_round_one():
    federation = Federation(job(build("fed-sb")))
    federation.number = 1  # skipped
    federation.play()
    assert set(federation.server.frozen) == set(SHAPES)
    federation.play()
    assert {name.rpartition("/")[2] for name in decode(federation.uploads["ada"]).entries} == {"R"}


def test_fed_sb_refuses_a_matrix_of_another_size():
    federation = Federation(job(build("fed-sb")))
    federation.play()
    header = read_header(federation.uploads["ada"])
    base = federation.server.digest
    sender = sender_digest("ada", base, 2)
    header = replace(header, round=2, base_version=1, base_digest=base, result_digest=sender)
    small = encode(Message(header, {f"{module}/R": dense_entry(torch.eye(3)) for module in SHAPES}))
    with pytest.raises(RoundError, match=r"shape \(3, 3\), expected \(3, 4\)"):
        server_turn(federation.job, federation.server, {"ada": small}, 2)
