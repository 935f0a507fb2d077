"""Training by forward passes alone, on a real model: no gradient, the same bits, and what is sent is what was done."""

from __future__ import annotations

import pytest
import torch

from fedloom.errors import NumericError
from fedloom.lora.directions import move_along_all
from fedloom.lora.pair import LoraState, digest, initial_state
from fedloom.methods.forward import ForwardOnly
from fedloom.model import peft_bridge
from fedloom.model.examples import Example
from fedloom.model.forward import forward_update, mean_loss
from fedloom.model.tokens import TokenizedExamples, tokenize
from fedloom.records.config import TrainingSettings
from tiny_models import llama, placed, tokenizer

SETTINGS = TrainingSettings(learning_rate=0.05, max_steps=3, per_device_train_batch_size=4)
FORWARD = ForwardOnly(32, 2, 1e-3, False)


@pytest.fixture(scope="module")
def resident():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = llama()
    adapter = placed(base, r=4, lora_alpha=12)
    model = peft_bridge.attach(base, adapter)
    yield model, initial_state(adapter.shapes, adapter.ranks, 1)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data() -> TokenizedExamples:
    examples = [Example(f"{7919 * number}?", "ab"[: 1 + number % 2] * 2) for number in range(1, 7)]
    return tokenize(examples, tokenizer(), "plain", 32)


def update(resident, data, settings=SETTINGS, **changed):
    model, state = resident
    given = {"curvature": LoraState(), "run_seed": 3, "round": 2, "num_rounds": 10, "seed": 7} | changed
    return forward_update(model, state, LoraState(), data, settings, FORWARD, **given)


def test_the_same_arguments_give_the_same_bits_and_others_others(resident, data):
    (one, moved, stats), (again, _, _) = update(resident, data), update(resident, data)
    assert digest(one) == digest(again) and stats.steps == 3 and stats.examples == 6 and stats.tokens > 0
    assert digest(update(resident, data, seed=8)[0]) != digest(one)
    assert digest(update(resident, data, run_seed=4)[0]) != digest(one)
    assert 3 <= int(moved.count_nonzero()) <= 6


def test_the_adapter_is_the_first_one_and_the_steps_along_the_directions(resident, data):
    after, moved, _ = update(resident, data)
    steps = {FORWARD.seed(3, 2, j): float(moved[j]) for j in moved.nonzero().flatten().tolist()}
    again = move_along_all(resident[1], steps)
    for name, tensor in after.tensors().items():
        assert torch.allclose(tensor, again.tensors()[name], atol=1e-5)


def test_no_parameter_takes_a_gradient_and_the_loss_falls(resident, data):
    model, state = resident
    batch = [data.collate(data.examples)]

    def loss(adapter: LoraState) -> float:
        peft_bridge.write_adapter(model, adapter)
        with torch.no_grad():
            return mean_loss(model.eval(), batch)

    before = loss(state)
    settings = SETTINGS.model_copy(update={"max_steps": 30, "lr_scheduler_type": "constant", "learning_rate": 5e-3})
    after, _, _ = update(resident, data, settings)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert loss(after) < before


def test_losses_of_micro_batches_are_weighed_by_their_tokens(resident, data):
    model, state = resident
    peft_bridge.write_adapter(model, state)
    model.eval()
    with torch.no_grad():
        whole = mean_loss(model, [data.collate(data.examples[:6])])
        parts = mean_loss(model, [data.collate(data.examples[:2]), data.collate(data.examples[2:6])])
    assert parts == pytest.approx(whole, rel=1e-5)


def test_whoever_interrupts_is_asked_before_every_forward_pass(resident, data):
    passes = []

    def interrupt() -> None:
        passes.append(len(passes))
        if len(passes) == 9:
            raise NumericError("too long")

    settings = SETTINGS.model_copy(update={"gradient_accumulation_steps": 2})
    with pytest.raises(NumericError, match="too long"):
        update(resident, data, settings, interrupt=interrupt)
    assert len(passes) == 9  # of 3 steps, 2 directions, 2 sides and 2 micro-batches
