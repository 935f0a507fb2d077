"""A model is gone through once for a training, not once a step, and trains the same bits as when it is asked anew."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from accelerate import optimizer as accelerated
from test_training import SETTINGS, changed, one_thread, resident, update
from torch import nn

from fedloom.lora.pair import digest
from fedloom.model import peft_bridge, training
from fedloom.model.settled import ask_once, set_mode, settle

__all__ = ["one_thread"]  # the fixture holds here too


def small() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)))
    model[0].weight.requires_grad_(False)
    model[1][1].weight = model[1][1].weight
    return model.eval()


def test_a_settled_model_answers_as_it_did() -> None:
    model = small()
    before = dict(vars(model))
    named, modules = list(model.named_parameters()), list(model.modules())
    prefixed, own = dict(model.named_parameters("of")), dict(model.named_parameters(recurse=False))
    with settle(model):
        assert all(module.training for module in modules)
        assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
        for given, held in zip(model.named_parameters(), named, strict=True):
            assert given[0] == held[0] and given[1] is held[1]
        assert [*map(id, model.parameters())] == [id(parameter) for _, parameter in named]
        assert dict(model.named_parameters("of")).keys() == prefixed.keys()
        assert dict(model.named_parameters(recurse=False)) == own == {} and list(model.parameters(False)) == []
        model(torch.ones(2, 3)).sum().backward()
        assert any(parameter.grad is not None for parameter in model.parameters())
        model.zero_grad(set_to_none=False)
        assert model[1][1].weight.grad.abs().sum() == 0
        model.zero_grad()
        assert all(parameter.grad is None for _, parameter in named)
        assert model.eval() is model and not any(module.training for module in modules)
        assert model.train() is model and all(module.training for module in modules)
    assert dict(vars(model)) == before | {"training": True}


def test_a_mode_is_set_as_torch_sets_it() -> None:
    told: list[bool] = []

    class Own(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            told.append(mode)
            return super().train(mode)

    plain, (model, _) = small(), resident()
    own = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Own(2, 2)))
    for mode in (True, False, True):
        for one in (plain, model, own):
            before = [dict(vars(module)) for module in one.modules()]
            set_mode(one, mode)
            found = [dict(vars(module)) for module in one.modules()]
            one.train(mode)
            assert found == [vars(module) for module in one.modules()]
            assert found == [held | {"training": mode} for held in before]
    assert told == [True, True, False, False, True, True]


def test_it_is_as_before_after_an_error() -> None:
    model = small()
    with pytest.raises(KeyError), settle(model):
        raise KeyError
    assert vars(model).keys() == vars(small()).keys()


def test_steps_go_through_no_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = resident()
    update(model, state)  # a model's first training tries out its head
    asked: Counter[str] = Counter()

    def count(name: str) -> None:
        original = getattr(nn.Module, name)

        def counted(self: nn.Module, *given: object, **named: object) -> object:
            asked[name] += self is model
            return original(self, *given, **named)

        monkeypatch.setattr(nn.Module, name, counted)

    for name in ("named_modules", "train", "zero_grad"):
        count(name)
    found = []
    for steps in (1, 5):
        asked.clear()
        update(model, state, settings=changed(SETTINGS, max_steps=steps))
        found.append(dict(asked))
    assert found[0] == found[1] and found[0]["named_modules"] <= 4


@pytest.mark.parametrize("own", [{}, {"weight_decay": 0.1}, {"max_grad_norm": 1e-3}, {"max_grad_norm": 0.0}])
def test_the_bits_are_those_of_a_trainer_that_looks_each_time(
    own: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = resident()
    settings = changed(SETTINGS, **own)
    after, stats = update(model, state, settings=settings)
    monkeypatch.setattr(training, "settle", lambda model: nullcontext())
    monkeypatch.setattr(training, "ask_once", nullcontext)
    for name in ("_clip_grad_norm", "get_decay_parameter_names", "floating_point_ops"):
        monkeypatch.delattr(training._LocalTrainer, name)
    plain, plain_stats = update(model, state, settings=settings)
    assert digest(plain) == digest(after) and plain_stats.loss == stats.loss


def test_the_one_optimiser_of_a_turn_is_gone_before_the_adapter_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two moments are as large as two adapters, and the gradients as a third."""
    gc.collect()
    model, state = resident()
    made: list[weakref.ref[torch.optim.Optimizer]] = []
    create = training.Trainer.create_optimizer
    read = peft_bridge.read_adapter

    def creating(self: training.Trainer, *given: object) -> torch.optim.Optimizer:
        optimizer = create(self, *given)
        made.append(weakref.ref(optimizer))
        return optimizer

    def reading(model: nn.Module) -> object:
        assert made and all(one() is None for one in made)
        assert all(parameter.grad is None for parameter in model.parameters())
        return read(model)

    monkeypatch.setattr(training.Trainer, "create_optimizer", creating)
    monkeypatch.setattr(peft_bridge, "read_adapter", reading)
    update(model, state)
    assert len(made) == 1


def test_a_library_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(accelerated, "is_lomo_available", lambda: bool(asked.append(1)))
    known = accelerated.is_lomo_available
    with ask_once():
        assert not accelerated.is_lomo_available() and not accelerated.is_lomo_available()
    assert asked == [1] and accelerated.is_lomo_available is known
