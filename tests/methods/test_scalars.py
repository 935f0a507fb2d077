"""Methods whose clients train by forward passes alone and send scalars: FedKSeed, DeComFL and HiSo."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom import testbeds
from fedloom.compress.entries import Dense, Sparse, to_dense
from fedloom.compress.masks import seeded_signs
from fedloom.errors import ConfigError, NumericError, PolicyRefusal, ShapeError
from fedloom.lora.curvature import blend_curvature, scales_of
from fedloom.lora.directions import draw_direction, move_along
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.forward import ForwardOnly
from fedloom.methods.method import State
from fedloom.methods.table import build
from fedloom.model.forward import draw_batches, walk_along
from fedloom.records.config import TrainingSettings
from fedloom.records.configfile import load_config
from fedloom.rounds.checks import check_update
from fedloom.rounds.cohort import Cohort
from fedloom.rounds.decoded import Decoded
from fedloom.rounds.geometry import gram_matrix
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import accept, client_turn, full_state, server_turn, start
from fedloom.server.roster import same_state
from fedloom.site.guard import guard_training
from fedloom.site.privacy import Privacy
from fedloom.site.rules import Policy
from fedloom.wire import decode, encode
from fedloom.workspace.plan import check_method_takes
from fedloom.workspace.private import refuse_own_trainer
from toy import CLIENTS_OF_SCALARS, Federation, client_seed, initial, job, random_state, step, step_along

names = pytest.mark.parametrize("name", CLIENTS_OF_SCALARS)
WANTED = random_state(7)


def distance(adapter: LoraState, batch: object = None) -> float:
    """‖θ − wanted‖² / 2, a quadratic whose gradient is θ − wanted."""
    return sum(
        float((tensor.double() - WANTED.tensors()[name]).square().sum()) / 2
        for name, tensor in adapter.tensors().items()
    )


def walk(forward: ForwardOnly, adapter: LoraState, steps: int, rate: float, seed: int = 5):
    return walk_along(
        adapter,
        distance,
        iter([[]] * steps),
        forward,
        scales={},
        rate=lambda step: rate,
        seed_of=lambda number: forward.seed(3, 1, number),
        seed=seed,
    )


# --- directions -------------------------------------------------------------------------------------------------------


def test_signs_are_the_bits_of_the_generator_that_the_page_names():
    """A slow twin of splitmix64 in Python's integers."""
    mask = 2**64 - 1

    def word(seed: int, j: int) -> int:
        z = (seed + (j + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return z ^ z >> 31

    wanted = [2 * (word(11, i // 64) >> i % 64 & 1) - 1 for i in range(333)]
    assert seeded_signs(333, 11).tolist() == wanted
    assert seeded_signs(70, 11).tolist() == wanted[:70]


def test_long_directions_are_balanced_and_nearly_orthogonal():
    one, other = seeded_signs(400_000, 1), seeded_signs(400_000, 2)
    assert set(one.unique().tolist()) == {-1.0, 1.0}
    for mean in (one.mean(), other.mean(), (one * other).mean(), (one[1:] * one[:-1]).mean()):
        assert abs(float(mean)) < 5 / 400_000**0.5


# --- curvature --------------------------------------------------------------------------------------------------------


def test_curvature_is_the_running_mean_of_squared_changes_whose_mean_is_one():
    before, after = random_state(1), random_state(2)
    once = blend_curvature(LoraState(), before, after, 0.25)
    twice = blend_curvature(once, after, before, 0.25)
    changes = {name: (tensor - before.tensors()[name]).double() for name, tensor in after.tensors().items()}
    mean = torch.cat([change.square().flatten() for change in changes.values()]).mean()
    for name, change in changes.items():
        first = 0.75 + 0.25 * change.square() / mean
        assert torch.allclose(once.tensors()[name].double(), first, rtol=1e-4)
        assert torch.allclose(twice.tensors()[name].double(), 0.75 * first + 0.25 * change.square() / mean, rtol=1e-4)
    assert all((scale * held.sqrt() - 1).abs().max() < 1e-6 for scale, held in by_name(scales_of(twice), twice))


def by_name(scales, curvature: LoraState):
    return [(scale, curvature.tensors()[name]) for name, scale in scales.items()]


def test_curvature_does_not_hang_on_the_order_in_which_elements_are_added_up():
    """Machines add in orders of their own; the same elements in another place must come to the same bits."""
    before, after = random_state(1), random_state(2)
    turned = [state.map(lambda pair: LoraPair(pair.A.flip(0, 1), pair.B.flip(0, 1))) for state in (before, after)]
    one, other = blend_curvature(LoraState(), before, after, 0.25), blend_curvature(LoraState(), *turned, 0.25)
    for name, held in one.tensors().items():
        assert torch.equal(held, other.tensors()[name].flip(0, 1))


def test_curvature_stays_where_nothing_has_moved():
    held = blend_curvature(LoraState(), random_state(1), random_state(2), 0.25)
    assert blend_curvature(held, random_state(1), random_state(1), 0.25) is held
    assert not blend_curvature(LoraState(), random_state(1), random_state(1), 0.25)


def test_one_element_that_moves_alone_is_curved_by_the_share_of_all():
    before = LoraState({"m": LoraPair(torch.zeros(1, 2), torch.zeros(2, 1))})
    after = LoraState({"m": LoraPair(torch.tensor([[3.0, 0.0]]), torch.zeros(2, 1))})
    found = blend_curvature(LoraState(), before, after, 0.5)["m"]
    assert found.A[0, 0] == pytest.approx(0.5 + 0.5 * 4) and found.A[0, 1] == pytest.approx(0.5, abs=1e-5)


def test_without_smoothing_hiso_is_decomfl():
    plain, scaled = (Federation(job(build(name, own))) for name, own in (("decomfl", {}), ("hiso", {"smoothing": 0.0})))
    for run in (plain, scaled):
        for _ in range(3):
            run.play()
    assert all(torch.equal(t, scaled.server.adapter.tensors()[n]) for n, t in plain.server.adapter.tensors().items())
    assert not scaled.server.curvature


def test_a_newcomer_is_sent_the_curvature_with_the_full_state():
    run = Federation(job(build("hiso")))
    for _ in range(3):
        run.play()
    joined = accept(run.job, start(run.job, initial()), full_state(run.job, run.server, 3))
    assert joined.curvature and joined.curvature.tensors().keys() == run.server.adapter.tensors().keys()
    assert same_state(joined, run.server)
    run.play()
    run.settle()
    joined = accept(run.job, joined, run.broadcasts[-1])
    for state in (joined, run.clients["ada"]):
        assert state.version == 4 and same_state(state, run.server)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda held: {**held, "layers.1.down/curvature_A": torch.zeros(4, 17)}, NumericError, "not above 0"),
        (lambda held: {**held, "layers.1.down/curvature_A": torch.ones(4, 16)}, ShapeError, "expected"),
        (lambda held: {n: t for n, t in held.items() if n != "layers.1.down/curvature_B"}, ShapeError, "curvature_B"),
        (lambda held: {n: t for n, t in held.items() if "down/curvature" not in n}, ShapeError, "lacks tensor"),
    ],
)
def test_a_full_state_with_a_curvature_that_no_run_can_have_is_refused(change, error, match: str):
    run = Federation(job(build("hiso")))
    run.play()
    message = decode(full_state(run.job, run.server, 1))
    altered = change({name: to_dense(entry) for name, entry in message.entries.items()})
    entries = {name: Dense(tuple(tensor.shape), tensor.flatten()) for name, tensor in altered.items()}
    with pytest.raises(error, match=match):
        accept(run.job, start(run.job, initial()), encode(replace(message, entries=entries)))


def test_no_other_method_takes_a_curvature():
    scaled, plain = (Federation(job(build(name))) for name in ("hiso", "decomfl"))
    scaled.play()
    message = decode(full_state(scaled.job, scaled.server, 1))
    payload = encode(replace(message, header=replace(message.header, method="decomfl")))
    with pytest.raises(ShapeError, match="curvature_"):
        accept(plain.job, start(plain.job, initial()), payload)


# --- the training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_scalars_are_those_of_a_twin_that_moves_a_model_by_hand(shared: bool):
    forward = ForwardOnly(16, 3, 1e-2, shared)
    begun = random_state(1)
    found = walk(forward, begun, steps=4, rate=0.02)
    flat = np.concatenate([t.double().numpy().ravel() for t in begun.tensors().values()])
    goal = np.concatenate([t.double().numpy().ravel() for t in WANTED.tensors().values()])
    moved = np.zeros(16)
    for number in range(4):
        tried = forward.numbers(number, 5)
        assert len(set(tried)) == 3
        signs = [seeded_signs(flat.size, forward.seed(3, 1, j)).double().numpy() for j in tried]
        slopes = [
            (np.sum((flat + 1e-2 * z - goal) ** 2) - np.sum((flat - 1e-2 * z - goal) ** 2)) / 2 / (2 * 1e-2)
            for z in signs
        ]
        for j, z, slope in zip(tried, signs, slopes, strict=True):
            moved[j] -= 0.02 * slope / 3
            flat = flat - 0.02 * slope / 3 * z
    assert np.allclose(found.moved.numpy(), moved, rtol=1e-3, atol=1e-5)
    assert np.allclose(np.concatenate([t.numpy().ravel() for t in found.adapter.tensors().values()]), flat, atol=1e-4)


def test_a_slope_times_its_direction_is_the_gradient_on_the_mean():
    """Σ_j g_j z_j / N over many directions, on a quadratic whose gradient is known."""
    begun, total = random_state(1), 1000
    forward = ForwardOnly(total, total, 1e-2, True)
    step = walk(forward, begun, steps=1, rate=1.0).adapter
    for name, tensor in begun.tensors().items():
        gradient = tensor - WANTED.tensors()[name]
        # An element's error has the variance Σ_i g_i² / N: of all other elements.
        spread = (2 * distance(begun) / total) ** 0.5
        errors = tensor - step.tensors()[name] - gradient
        assert errors.abs().max() < 5 * spread and errors.mean().abs() < 5 * spread / errors.numel() ** 0.5


def test_every_row_comes_once_before_any_comes_again():
    settings = TrainingSettings(max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    drawn = list(draw_batches(7, settings, 3))
    assert [len(batch) for batch in drawn] == [2] * 5
    flat = [row for batch in drawn for rows in batch for row in rows]
    assert sorted(flat[:7]) == list(range(7)) and sorted(flat[7:14]) == list(range(7))
    assert drawn == list(draw_batches(7, settings, 3)) != list(draw_batches(7, settings, 4))


def test_directions_are_kept_over_rounds_or_shared_within_one():
    own, shared = build("fedkseed").forward, build("decomfl").forward
    assert own.seed(3, 1, 5) == own.seed(3, 9, 5) and own.numbers(0, 1) != own.numbers(0, 2)
    assert shared.seed(3, 1, 5) != shared.seed(3, 9, 5) and shared.numbers(1, 1) == shared.numbers(1, 2)


@names
def test_rules_on_updates_see_inner_products_of_the_steps(name: str):
    """Directions are nearly orthogonal and of one length, so that these stand for those of the factors."""
    run = Federation(job(build(name)))
    done = {c: run.train(run.server, 1, client_seed(run.job, c, 1)) for c in run.clients}
    payloads = {c: run.client_turn(c, lambda s, r, k, c=c: done[c]) for c in run.clients}
    facts = {c: check_update(run.job, run.server, c, payload, 0) for c, payload in payloads.items()}
    cohort = Cohort(payloads, {}, facts, Decoded.beside(run.server))
    found = gram_matrix(run.job.method, run.server, cohort, list(done))
    steps = torch.stack([trained.moved.double() for trained in done.values()])
    assert torch.allclose(found, len(run.server.adapter) * steps @ steps.T, rtol=1e-5)


# --- what travels -----------------------------------------------------------------------------------------------------


@names
def test_the_model_is_the_first_one_and_the_sums_along_all_directions(name: str):
    """A dense twin in float64 over four rounds, from what the clients say that they did."""
    run = Federation(job(build(name)))
    forward = run.job.method.forward
    expected = {n: t.double() for n, t in run.server.adapter.tensors().items()}
    curved = {n: torch.ones_like(t) for n, t in expected.items()}
    for round in range(1, 5):
        before = {n: t.clone() for n, t in expected.items()}
        done = {c: run.train(run.server, round, client_seed(run.job, c, round)) for c in run.clients}
        whole = sum(trained.num_examples for trained in done.values())
        run.play()
        for trained in done.values():
            for j in trained.moved.nonzero().flatten().tolist():
                for n, signs in draw_direction(run.server.adapter, forward.seed(run.job.seed, round, j)).items():
                    step = trained.num_examples / whole * float(trained.moved[j])
                    expected[n] += step * signs / curved[n].sqrt()
        squares = {n: (t - before[n]).square() for n, t in expected.items()}
        mean = torch.cat([square.flatten() for square in squares.values()]).mean()
        share = forward.curvature
        curved = {n: (1 - share) * held + share * squares[n] / mean for n, held in curved.items()}
    for n, tensor in run.server.adapter.tensors().items():
        assert torch.allclose(tensor.double(), expected[n], atol=1e-5)


@names
def test_a_payload_has_the_scalars_once_whatever_the_number_of_modules(name: str):
    run = Federation(job(build(name), values="bf16"))
    run.play()
    for payload in [*run.uploads.values(), run.broadcasts[-1]]:
        assert list(decode(payload).entries) == ["scalars"]
        assert len(payload) < 400


def test_own_directions_travel_by_number_and_shared_ones_by_place():
    own, shared = (Federation(job(build(name))) for name in ("fedkseed", "decomfl"))
    own.play()
    shared.play()
    one, other = (decode(run.uploads["ada"]).entries["scalars"] for run in (own, shared))
    assert isinstance(one, Sparse) and one.shape == (4096,) and one.positions.numel() == 5
    assert isinstance(other, Dense) and other.shape == (50,)


@names
def test_a_training_of_another_kind_is_refused_by_name(name: str):
    run = job(build(name))
    begin = start(run, initial())
    with pytest.raises(ConfigError, match=f"method '{name}' trains by forward passes"):
        client_turn(run, "ada", begin, (), step, 1)


@names
def test_a_vector_of_too_many_directions_is_refused(name: str):
    small = job(replace(build(name, {"seeds": 8, "perturbations": 2}), name=name))
    large = job(build(name))
    begin = start(small, initial())
    moved = torch.ones(32)

    def train(state: State, round: int, seed: int) -> Trained:
        return replace(step_along(large.method, 3)(state, round, seed), moved=moved)

    payload = client_turn(large, "ada", begin, (), train, 1).payload
    fair = client_turn(small, "bob", begin, (), step_along(small.method, 3), 1).payload
    turn = server_turn(small, begin, {"ada": payload, "bob": fair}, 1)
    assert list(turn.refused) == ["ada"] and "at most" in turn.refused["ada"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"seeds": 0}, "method.seeds is 0"),
        ({"seeds": 4, "perturbations": 5}, "method.perturbations is 5: expected 1 to 4"),
        ({"epsilon": 0.0}, "method.epsilon is 0"),
    ],
)
@names
def test_settings_out_of_range_are_refused(name: str, settings: dict[str, float], match: str):
    with pytest.raises(ConfigError, match=match):
        build(name, settings)


@names
def test_a_federation_of_quadratics_comes_nearer(name: str):
    """Three clients whose optima differ: the mean of them is what the federation goes to."""
    goals = {client: random_state(seed) for seed, client in enumerate(("ada", "bob", "cyd"))}

    def gap(adapter: LoraState) -> float:
        means = {n: sum(goal.tensors()[n] for goal in goals.values()) / 3 for n in adapter.tensors()}
        return sum(float((tensor - means[n]).square().sum()) for n, tensor in adapter.tensors().items())

    method = build(name, {"perturbations": 4})

    def trainer_of(client: str):
        def loss(adapter: LoraState, batch: object) -> float:
            wanted = goals[client].tensors()
            return sum(float((t.double() - wanted[n]).square().sum()) / 2 for n, t in adapter.tensors().items())

        def train(state: State, round: int, seed: int) -> Trained:
            done = walk_along(
                state.adapter,
                loss,
                iter([[]] * 6),
                method.forward,
                scales=scales_of(state.curvature),
                rate=lambda step: 0.01,
                seed_of=lambda number: method.forward.seed(3, round, number),
                seed=seed,
            )
            return Trained(done.adapter, 1, done.loss, 6, moved=done.moved)

        return train

    run = Federation(job(method, weighting="uniform"))
    begun = gap(run.server.adapter)
    run.training = trainer_of
    for _ in range(10):
        run.play()
    assert gap(run.server.adapter) < 0.75 * begun


def test_a_step_along_a_direction_moves_every_element_alike():
    adapter = random_state(1)
    moved = move_along(adapter, draw_direction(adapter, 9), 0.25)
    for name, tensor in moved.tensors().items():
        assert torch.allclose((tensor - adapter.tensors()[name]).abs(), torch.full_like(tensor, 0.25), atol=1e-6)


@pytest.mark.parametrize("key", ["gradient_checkpointing=true", "dp.noise_multiplier=1.0"])
@names
def test_settings_about_gradients_are_refused(name: str, key: str):
    config = load_config(testbeds.testbed_folder() / "demo.toml", [f"training.{key}"])
    said = key.partition("=")[0].partition(".")[0]
    with pytest.raises(ConfigError, match=f"training.{said} is about gradients, and method '{name}'"):
        check_method_takes(build(name), config)


@names
def test_noise_at_a_site_does_not_stand_for_noise_on_scalars(name: str):
    """The noise is on the adapter, and what is sent is not made from it: nothing may leave."""
    charged: list[int] = []
    policy = Policy(privacy=Privacy(clip_norm=1.0, noise_multiplier=1.0))
    guarded = guard_training(policy, step_along(build(name), 3), build(name).trainable, lambda: charged.append(1))
    with pytest.raises(PolicyRefusal, match="does not cover"):
        guarded(State(initial()), 1, 7)
    assert not charged


@names
def test_a_trainer_of_ones_own_is_refused_before_a_run(name: str):
    with pytest.raises(ConfigError, match=f"method '{name}' trains by forward passes"):
        refuse_own_trainer(load_config(testbeds.testbed_folder() / "demo.toml"), build(name))
