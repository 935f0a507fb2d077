"""Noise on single examples: gradients are held to examples one at a time, steps to a plain DP-SGD written out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_peft_bridge import random_state
from test_training import client, resident

from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState, digest
from fedloom.model import example_gradients, peft_bridge, private
from fedloom.model.example_gradients import all_at_once, choose_way, clipped_sums, one_by_one, squared_norms
from fedloom.model.private import PrivateRound
from fedloom.model.training import local_update
from fedloom.noise.accounting import SampledNoise, example_epsilon
from fedloom.noise.secret import derive_key
from fedloom.noise.stream import SecretStream
from fedloom.records.config import TrainingSettings
from fedloom.records.configfile import parse
from fedloom.records.noise import plan_noise
from fedloom.records.sections.dp import DpSettings

KEY = derive_key(b"secret", "a test")
SETTINGS = TrainingSettings(learning_rate=0.1, max_steps=2, per_device_train_batch_size=4, optim="sgd")


def ready(name="llama", trainable=("A", "B"), **lora):
    model, state = resident(name, **lora)
    peft_bridge.write_adapter(model, state)
    peft_bridge.set_trainable(model, trainable)
    return model, state


def batch(count=5, seed=0):
    data = client(seed, count)
    return data.collate(list(data.examples))


def same(one, other):
    return all(torch.allclose(held, other[parameter], rtol=1e-3, atol=1e-6) for parameter, held in one.items())


@pytest.mark.parametrize(
    ("name", "trainable"), [("llama", ("A", "B")), ("gpt2", ("A", "B")), ("qwen2", ("B",)), ("mistral", ("A",))]
)
def test_one_pass_gives_the_gradients_of_examples_one_at_a_time(name, trainable):
    model, _ = ready(name, trainable)
    together, alone = all_at_once(model, batch()), one_by_one(model, batch())
    assert together.keys() == alone.keys() and len(alone) > 2
    assert same(together, alone) and squared_norms(alone).min() > 0
    assert choose_way(model, 0) is all_at_once


def test_the_gradient_of_a_matrix_between_the_factors_too():
    model, state = ready()
    peft_bridge.set_trainable(model, ())
    with peft_bridge.training_core(model, random_state(state.shapes(), state.ranks())):
        together, alone = all_at_once(model, batch()), one_by_one(model, batch())
    assert same(together, alone) and all(held.shape[1:] == (4, 4) for held in alone.values())


def test_recomputed_activations_change_no_gradient():
    model, _ = ready()
    model.train()
    plain = all_at_once(model, batch())
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert same(plain, all_at_once(model, batch()))


def test_a_model_in_which_examples_meet_is_given_them_one_at_a_time(monkeypatch):
    model, _ = ready()
    losses = example_gradients.mean_losses

    def mixed(model, inputs):  # as a loss that balances experts over the whole batch
        found = losses(model, inputs)
        return found * found.mean()

    monkeypatch.setattr(example_gradients, "mean_losses", mixed)
    assert choose_way(model, 0) is one_by_one


def test_a_layer_that_does_not_tell_examples_apart_is_noticed():
    model, _ = ready()
    layer = next(peft_bridge.lora_layers(model)).layer
    forward = layer.forward
    layer.forward = lambda x: forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    assert choose_way(model, 0) is one_by_one


def test_no_example_counts_for_more_than_the_norm_and_a_broken_one_for_nothing():
    model, _ = ready()
    found = one_by_one(model, batch())
    norms = squared_norms(found).sqrt()
    limit = float(norms.median())
    scaled = {p: held * (limit / norms).clamp(max=1.0).view(-1, 1, 1) for p, held in found.items()}
    assert (squared_norms(scaled).sqrt() <= limit * 1.0001).all()
    assert same({p: held.sum(0) for p, held in scaled.items()}, clipped_sums(found, limit))
    first = next(iter(found))
    without = {p: held[1:].sum(0) for p, held in scaled.items()}
    found[first][0, 0, 0] = math.nan
    assert same(without, clipped_sums(found, limit))


def fit(model, state, settings=SETTINGS, key=KEY, noise=None, clip=0.5, **more):
    noise = noise or SampledNoise(0.5, 0.3, settings.steps)
    return local_update(
        model, state, LoraState(), client(), settings, round=1, num_rounds=1, seed=1,
        private=PrivateRound(noise, clip, key), **more,
    )  # fmt: skip


def test_steps_are_those_of_dp_sgd_written_out():
    model, state = resident()
    after, stats = fit(model, state)
    model, _ = ready()
    model.train()
    data, stream = client(), SecretStream(KEY)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        drawn = [data[int(place)] for place in np.flatnonzero(stream.uniform(8) < 0.5)]
        sums = {p: torch.zeros_like(p) for p in parameters}
        for example in drawn:
            own = one_by_one(model, data.collate([example]))
            norm = math.sqrt(sum(float(g.square().sum()) for g in own.values()))
            for p in parameters:
                sums[p] += own[p][0] * min(1.0, 0.5 / norm)
        with torch.no_grad():
            for p in parameters:
                noise = torch.from_numpy(stream.normal(p.numel())).view_as(p) * 0.3 * 0.5
                p -= 0.1 * ((sums[p] + noise) / 4).float()
    wanted = peft_bridge.read_adapter(model)
    assert all(torch.allclose(after.tensors()[n], t, atol=1e-5) for n, t in wanted.tensors().items())
    assert math.isnan(stats.loss) and stats.steps == 2 and stats.examples == 8


def test_the_same_key_gives_the_same_bits_and_another_one_others():
    model, state = resident()
    first, again, other = (digest(fit(model, state, key=key)[0]) for key in (KEY, KEY, derive_key(b"secret", "b")))
    assert first == again != other


def test_a_round_in_which_nobody_is_drawn_is_noise():
    model, state = resident()
    after, _ = fit(model, state, noise=SampledNoise(1e-12, 1e-3, 1))
    assert digest(after) != digest(state)  # that it was empty does not show


def test_factors_that_are_not_trained_keep_their_bits_and_a_penalty_counts():
    model, state = resident()
    after, _ = fit(model, state, trainable=("B",))
    assert all(
        torch.equal(after[name].A, pair.A) and not torch.equal(after[name].B, pair.B) for name, pair in state.items()
    )
    pulled, _ = fit(model, state, trainable=("B",), penalty=lambda before, now: sum(p.B.sum() for p in now.values()))
    assert digest(pulled) != digest(after)


def test_the_noise_of_a_plan_keeps_epsilon_for_all_rounds():
    settings = SETTINGS.model_copy(update={"dp": DpSettings(epsilon=8.0), "max_steps": 10})
    planned = plan_noise(settings, 200, 20)
    assert planned is not None and (planned.sampling_rate, planned.steps) == (0.02, 10)
    assert 7.9 < example_epsilon([planned] * 20, 1 / 200) <= 8.0
    assert plan_noise(settings, 2, 20).sampling_rate == 1.0 and plan_noise(SETTINGS, 200, 20) is None
    given = settings.model_copy(update={"dp": DpSettings(noise_multiplier=1.5)})
    assert plan_noise(given, 200, 20).noise_multiplier == 1.5


def test_the_stream_is_uniform_normal_and_its_keys_are_apart():
    stream = SecretStream(KEY)
    held = np.sort(stream.normal(4001))
    expected = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in held])
    assert np.abs(expected - np.arange(1, 4002) / 4001).max() < 1.95 / math.sqrt(4001)  # Kolmogorov, 0.1 %
    counts = np.bincount(stream.below(7, 7000), minlength=7)
    assert ((counts - 1000) ** 2 / 1000).sum() < 22.5  # χ² of 6 degrees, 0.1 %
    assert not np.array_equal(SecretStream().words(4), SecretStream().words(4))
    assert derive_key(b"s", "a", 1) != derive_key(b"s", "a", 2) != derive_key(b"t", "a", 2)


def test_settings_that_take_the_promise_away_are_refused():
    for tree, said in [
        ({"training": {"dp": {"epsilon": 8.0}}, "data": {"packing": True}}, "packed row"),
        ({"training": {"dp": {"epsilon": 8.0, "noise_multiplier": 1.0}}}, "one of epsilon"),
        ({"training": {"dp": {"clip_norm": 1.0}}}, "one of epsilon"),
        ({"training": {"dp": {"epsilon": 8.0}}, "federation": {"mode": "buffered"}}, "synchronous"),
    ]:
        with pytest.raises(ConfigError, match=said):
            parse(tree, "a test")


def test_uneven_ranks_within_a_parameter_are_refused(monkeypatch):
    model, state = resident()
    held = next(peft_bridge.lora_layers(model))
    monkeypatch.setattr(private.peft_bridge, "lora_layers", lambda model: [replace(held, parameter="x.y")])
    monkeypatch.setattr(type(held), "ranks", lambda self, slot: (1, 2))
    with pytest.raises(ConfigError, match="equal ranks"):
        fit(model, state)
