"""Local training is held to one step of a dense float64 twin, and to giving the same bits whatever came before."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_peft_bridge import random_state
from torch.func import functional_call
from torch.nn.attention import _cur_sdpa_kernel_backends

from fedloom.errors import ConfigError, NumericError
from fedloom.lora.pair import LoraPair, LoraState, core_matrix, digest, initial_state
from fedloom.model import peft_bridge, training
from fedloom.model.examples import Example
from fedloom.model.packing import may_share
from fedloom.model.tokens import TokenizedExamples, tokenize
from fedloom.model.training import local_update, rate_at
from fedloom.records.config import LoraSettings, TrainingSettings
from tiny_models import MODELS, llama, placed, tokenizer

SETTINGS = TrainingSettings(learning_rate=1e-2, max_steps=4, per_device_train_batch_size=4)
LORA = LoraSettings(r=4, lora_alpha=12)


def changed(settings: TrainingSettings, **changes: object) -> TrainingSettings:
    return settings.model_copy(update=changes)


SGD = changed(SETTINGS, optim="sgd", learning_rate=0.1, max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=8)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def client(seed: int = 0, count: int = 8) -> TokenizedExamples:
    draw = random.Random(seed)
    rows = [Example(f"{draw.randrange(10**5)}?", "ab"[: 1 + draw.randrange(2)] * 2) for _ in range(count)]
    return tokenize(rows, tokenizer(), "plain", 32)


def resident(name: str = "llama", **lora: object) -> tuple[torch.nn.Module, LoraState]:
    base = MODELS[name]()
    adapter = placed(base, **{**LORA.model_dump(), **lora})
    return peft_bridge.attach(base, adapter), random_state(adapter.shapes, adapter.ranks)


def update(
    model,
    state,
    data=None,
    settings=SETTINGS,
    *,
    frozen=None,
    round=1,
    seed=1,
    trainable=("A", "B"),
    core=None,
    penalty=None,
):
    return local_update(
        model,
        state,
        frozen or LoraState(),
        data or client(),
        settings,
        round=round,
        num_rounds=10,
        seed=seed,
        trainable=trainable,
        core=core,
        penalty=penalty,
    )


def dense_loss(name: str, data: TokenizedExamples, *states: LoraState) -> torch.Tensor:
    """Mean negative log-likelihood of all completion tokens, one example at a time, in float64."""
    model = MODELS[name]().double()
    weights = dict(model.named_parameters())
    for module in {module for state in states for module in state}:
        change = sum(state[module].B @ state[module].A for state in states if module in state)
        old = weights[f"{module}.weight"]
        weights[f"{module}.weight"] = old + (change if old.shape == change.shape and name != "gpt2" else change.T)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens in data.examples:
        ids = tokens.ids.long()
        logits = functional_call(model, weights, (ids[None],), {"use_cache": False}).logits[0]
        for place in range(tokens.prompt, len(ids)):
            total = total - logits[place - 1].log_softmax(dim=0)[ids[place]]
            count += 1
    return total / count


def double(state: LoraState, requires_grad: bool = False) -> LoraState:
    return state.map(lambda p: LoraPair(*(x.double().requires_grad_(requires_grad) for x in (p.A, p.B))))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parts", [1, 2])
def test_one_step_is_that_of_the_dense_twin(name: str, parts: int) -> None:
    """Only completion tokens count, each as much as any other, however the step is cut into micro-batches."""
    model, state = resident(name)
    frozen = random_state(state.shapes(), dict.fromkeys(state, 2), seed=1)
    data = client(count=8)
    settings = changed(SGD, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts)
    after, stats = update(model, state, data, settings, frozen=frozen)
    before = double(state, requires_grad=True)
    loss = dense_loss(name, data, before, double(frozen))
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    assert (stats.steps, stats.examples) == (1, 8)
    assert stats.tokens == sum(len(tokens.ids) for tokens in data.examples)
    scale = LORA.lora_alpha / LORA.r
    for module, pair in before.items():
        torch.testing.assert_close(after[module].A.double(), pair.A - 0.1 * pair.A.grad, atol=3e-6, rtol=0)
        torch.testing.assert_close(after[module].B.double(), pair.B - 0.1 * scale**2 * pair.B.grad, atol=3e-6, rtol=0)
        assert pair.B.grad.abs().max() > 1e-4


@pytest.mark.parametrize("parts", [1, 2])
def test_a_penalty_is_added_once_a_step(parts: int) -> None:
    model, state = resident()
    settings = changed(SGD, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts)
    plain, without = update(model, state, settings=settings)
    seen = []

    def penalty(before: LoraState, now: LoraState) -> torch.Tensor:
        seen.append(before is state)
        return sum(0.5 * (now[module].A - before[module].A - 1).square().sum() for module in now)

    pulled, stats = update(model, state, settings=settings, penalty=penalty)
    assert seen == [True] * parts
    assert stats.loss == without.loss
    for module, pair in plain.items():
        torch.testing.assert_close(pulled[module].A, pair.A + 0.1, atol=1e-6, rtol=0)
        assert torch.equal(pulled[module].B, pair.B)


@pytest.mark.parametrize("part", ["A", "B"])
def test_factors_that_are_not_trained_keep_their_bits(part: str) -> None:
    model, state = resident()
    after, _ = update(model, state, trainable=(part,))
    fixed = "B" if part == "A" else "A"
    for module, pair in after.items():
        assert torch.equal(pair.part(fixed), state[module].part(fixed))
        assert not torch.equal(pair.part(part), state[module].part(part))
    both, _ = update(model, state)
    assert all(not torch.equal(both[module].part(fixed), state[module].part(fixed)) for module in state)


def test_within_a_core_only_the_matrix_between_the_factors_moves() -> None:
    """AdamW's first step moves every element of R by the learning rate; the model is as it was afterwards."""
    model, state = resident()
    plain, _ = update(model, state)
    core = state.map(lambda pair: LoraPair(torch.linalg.qr(pair.A.T).Q.T, pair.B))
    begin = LoraState({m: LoraPair(torch.eye(pair.rank) @ core[m].A, pair.B) for m, pair in state.items()})
    settings = changed(SETTINGS, max_steps=1, learning_rate=1e-2, weight_decay=0.0)
    after, _ = update(model, begin, settings=settings, core=core, frozen=state)
    for module, pair in after.items():
        assert torch.equal(pair.B, begin[module].B)
        moved = core_matrix(pair.A - begin[module].A, core[module].A)
        torch.testing.assert_close(moved @ core[module].A, pair.A - begin[module].A, atol=1e-6, rtol=0)
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2), atol=1e-3, rtol=0)
    again, _ = update(model, state)
    assert digest(again) == digest(plain)


def test_same_arguments_same_bits_whatever_happened_before() -> None:
    model, state = resident("gpt2", lora_dropout=0.2)
    first, stats = update(model, state, frozen=state)
    update(model, first, client(5, 11), round=3, seed=2)
    torch.rand(3), random.random(), np.random.rand()
    again, _ = update(model, state, frozen=state)
    assert digest(again) == digest(first)
    other, _ = update(model, state, frozen=state, seed=3)
    assert digest(other) != digest(first), "the seed decides order and dropout"
    assert stats.seconds > 0


def test_a_fresh_process_gives_the_same_bits() -> None:
    model, state = resident(lora_dropout=0.2)
    here = digest(update(model, state)[0])
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from test_training import *\n"
        "print(digest(update(*resident(lora_dropout=0.2))[0]), end='')"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (here, "")


def test_the_seed_decides_the_order_of_examples() -> None:
    model, state = resident()
    settings = changed(SGD, per_device_train_batch_size=4)
    losses = {update(model, state, settings=settings, seed=seed)[1].loss for seed in range(4)}
    assert len(losses) == 4


def test_nothing_is_left_behind(capfd: pytest.CaptureFixture[str]) -> None:
    gc.collect()  # trainers of other tests
    model, state = resident()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    folder = set(os.listdir())
    update(model, state, penalty=lambda before, now: now[next(iter(now))].A.sum())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert not model.training and model.get_base_model().config.use_cache
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(issubclass(type(item), training.Trainer) for item in gc.get_objects())
    assert not gc.get_freeze_count()
    assert set(os.listdir()) == folder
    assert tuple(capfd.readouterr()) == ("", "")


def test_few_examples_are_gone_through_again() -> None:
    model, state = resident()
    data = client(count=3)
    _, stats = update(model, state, data, changed(SETTINGS, max_steps=5))
    assert (stats.steps, stats.examples) == (5, 3)
    assert stats.tokens == 5 * sum(len(tokens.ids) for tokens in data.examples)


def test_training_learns() -> None:
    model, drawn = resident()
    state = initial_state(drawn.shapes(), drawn.ranks(), 0)
    data = client(count=16)
    before = dense_loss("llama", data, double(state)).item()
    after, _ = update(model, state, data, changed(SETTINGS, max_steps=40))
    assert dense_loss("llama", data, double(after)).item() < before - 0.3


def test_checkpointing_changes_nothing_and_bf16_little() -> None:
    model, state = resident()
    plain, stats = update(model, state)
    calls: list[bool] = []
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(True))
    less_memory, _ = update(model, state, settings=changed(SETTINGS, gradient_checkpointing=True))
    assert len(calls) == 2 * SETTINGS.max_steps, "every layer is computed twice a step"
    again, _ = update(model, state)
    assert len(calls) == 3 * SETTINGS.max_steps, "and once where that is not asked for"
    coarse, rough = update(model, state, settings=changed(SETTINGS, bf16=True))
    assert digest(again) == digest(update(model, state)[0]) == digest(plain)
    for module, pair in plain.items():
        torch.testing.assert_close(less_memory[module].B, pair.B, atol=1e-5, rtol=0)
        assert coarse[module].B.dtype == torch.float32
    assert rough.loss == pytest.approx(stats.loss, rel=0.02) and rough.loss != stats.loss
    recomputed, _ = update(model, state, settings=changed(SETTINGS, bf16=True, gradient_checkpointing=True))
    assert digest(recomputed) == digest(coarse), "by the same attention in both passes"


def test_short_rows_in_bfloat16_have_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = resident()
    fused = training.SDPBackend.FLASH_ATTENTION
    seen: list[bool] = []
    monkeypatch.setattr(training, "narrow_head", lambda _: None)  # which goes through a new model twice
    may_share(model.get_base_model())  # and so does this
    norm = model.get_base_model().model.norm
    hook = norm.register_forward_hook(lambda *_: seen.append(fused in _cur_sdpa_kernel_backends()))
    update(model, state, settings=changed(SETTINGS, bf16=True))
    monkeypatch.setattr(training, "SHORT_ROWS", 4)
    update(model, state, settings=changed(SETTINGS, bf16=True))
    update(model, state)
    hook.remove()
    assert seen == [False] * SETTINGS.max_steps + [True] * 2 * SETTINGS.max_steps


def test_the_learning_rate_falls_over_the_rounds() -> None:
    flat = changed(SETTINGS, learning_rate=1.0, max_steps=10)
    assert [rate_at(flat, round, 4, 0) for round in (1, 3)] == pytest.approx([1.0, 0.5])
    assert rate_at(flat, 2, 3, 0) == rate_at(flat, 2, 3, 9) == pytest.approx(0.75)
    linear = changed(flat, lr_scheduler_type="linear")
    assert [rate_at(linear, round, 4, 5) for round in (1, 2, 3, 4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    constant = changed(flat, lr_scheduler_type="constant")
    for warm in (changed(constant, warmup_steps=20), changed(constant, warmup_ratio=0.5)):
        rates = [rate_at(warm, round, 4, step) for round in (1, 2, 3) for step in (0, 9)]
        assert rates == pytest.approx([0.05, 0.5, 0.55, 1.0, 1.0, 1.0])


def test_the_rate_reaches_the_optimiser() -> None:
    model, state = resident()
    first, _ = update(model, state, settings=changed(SGD, lr_scheduler_type="linear"), round=1)
    sixth, _ = update(model, state, settings=changed(SGD, lr_scheduler_type="linear"), round=6)
    for module, pair in state.items():
        torch.testing.assert_close(sixth[module].B - pair.B, (first[module].B - pair.B) / 2, atol=1e-6, rtol=0)


def test_settings_that_transformers_refuses() -> None:
    model, state = resident()
    with pytest.raises(ConfigError, match="adamax!"):
        update(model, state, settings=changed(SETTINGS, optim="adamax!"))


def test_llama_is_tied() -> None:
    """The model that these tests lean on shares input and output embeddings, as small models do."""
    model = llama()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_an_interrupt_is_asked_before_every_pass_and_leaves_the_model_as_it_was() -> None:
    model, state = resident()
    whole = update(model, state)[0]
    passes: list[int] = []

    def interrupt() -> None:
        passes.append(len(passes))
        if len(passes) == 6:
            raise NumericError("too long")

    settings = SETTINGS.model_copy(update={"gradient_accumulation_steps": 2})
    with pytest.raises(NumericError, match="too long"):
        local_update(model, state, LoraState(), client(), settings, round=1, num_rounds=10, seed=1, interrupt=interrupt)
    assert passes == list(range(6))
    assert digest(update(model, state)[0]) == digest(whole)


def test_steps_cost_nothing_before_they_are_taken() -> None:
    """A list of the rates of 10¹² steps would take the machine's memory."""
    model, state = resident()

    def interrupt() -> None:
        raise NumericError("the first pass")

    settings = SETTINGS.model_copy(update={"max_steps": 10**12})
    with pytest.raises(NumericError, match="the first pass"):
        local_update(model, state, LoraState(), client(), settings, round=1, num_rounds=10, seed=1, interrupt=interrupt)
