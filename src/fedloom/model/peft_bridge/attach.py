"""Wrapping a model with an adapter, once, and a slot for merged increments beside the trained one."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import transformers_weight_conversion as conversion
from torch import nn
from transformers import PreTrainedModel

from fedloom.adapters.patterns import literal_pattern
from fedloom.errors import ModelError
from fedloom.model.foreign import raise_in_one_line
from fedloom.model.peft_bridge.layers import FROZEN, TRAINED, layer_name, lora_layers
from fedloom.model.peft_bridge.survey import linear_beneath
from fedloom.model.placement import Adapter, Placement


def attach(model: PreTrainedModel, adapter: Adapter) -> peft.PeftModel:
    """Wrap the base model, once, with a trainable adapter that changes nothing yet (B = 0)."""
    if isinstance(model, peft.PeftModel) or any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ModelError("the base model already carries an adapter: merge it into the base, or load the plain base")
    if getattr(model, "is_quantized", False):
        model = peft.prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=False
        )
    return _wrap(model, _lora_config(adapter), TRAINED)


@contextmanager
def undisturbed() -> Iterator[None]:
    """PEFT draws starting values that are never used, calls names that transformers has deprecated, and takes a
    pattern for a parameter to be one that matches nothing.
    """
    with torch.random.fork_rng(range(min(torch.cuda.device_count(), 1))), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", ".*_pattern keys did not match any targeted module", RuntimeWarning)
        yield


@contextmanager
def _names_as_they_are() -> Iterator[None]:
    """PEFT takes some modules of a mixture for experts as older releases had them, by the ends of their names.

    The names here come from the model as it is. PEFT has no switch for it.
    """
    known = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda peft_config, model, conversions: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = known


def _wrap(model: PreTrainedModel | peft.PeftModel, config: peft.LoraConfig, slot: str) -> peft.PeftModel:
    with undisturbed(), _names_as_they_are(), raise_in_one_line(ModelError, "PEFT cannot adapt this model"):
        if isinstance(model, peft.PeftModel):
            model.add_adapter(slot, config)
            return model
        return peft.get_peft_model(model, config, adapter_name=slot)


def _lora_config(adapter: Adapter) -> peft.LoraConfig:
    """PEFT's settings, with a pattern for each place alone: PEFT runs no expression that came with the settings."""
    lora, settings = adapter.lora, adapter.settings
    inside = set(adapter.stacked)
    places: dict[str, Placement] = {}
    for name, placed in adapter.modules.items():
        place = settings.place(name)
        places[place if place in inside else name] = placed
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]
        target_modules=sorted(places.keys() - inside),
        target_parameters=list(adapter.stacked) or None,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        rank_pattern={literal_pattern(name): placed.rank for name, placed in places.items() if placed.rank != lora.r},
        alpha_pattern={
            literal_pattern(name): placed.alpha for name, placed in places.items() if placed.alpha != lora.lora_alpha
        },
        fan_in_fan_out=adapter.transposed,
    )


def configure(model: peft.PeftModel, adapter: Adapter) -> None:
    """Give the trained slot other alphas and another dropout, where clients differ; they hold from the next
    `write_adapter`.

    A module that the adapter is not on keeps its alpha: whoever does not train a module writes a pair of rank 0 there.
    """
    for held in lora_layers(model):
        layer, placed = held.layer, adapter.modules.get(held.names[0])
        if placed is not None:
            layer.lora_alpha[TRAINED] = placed.alpha
        # PEFT has none on a parameter: a client with dropout trains modules alone.
        dropout = 0.0 if held.parameter else adapter.lora.lora_dropout
        layer.use_rslora[TRAINED] = adapter.lora.use_rslora
        if getattr(layer.lora_dropout[TRAINED], "p", 0.0) != dropout:
            layer.lora_dropout[TRAINED] = nn.Dropout(dropout) if dropout else nn.Identity()


def active_slot(model: object) -> str:
    """The name of the adapter in use, in a model that somebody else has wrapped.

    Raises ModelError where the model is no PeftModel, or uses none, several, or merged ones.
    """
    if not isinstance(model, peft.PeftModel):
        raise ModelError(
            f"the trainer's model is a {type(model).__name__} without an adapter: wrap it with peft.get_peft_model, or "
            "give TRL's trainer a peft_config"
        )
    active = [name for name in model.active_adapters if name != FROZEN]
    if len(active) != 1:
        raise ModelError(f"the trainer's model uses {len(active)} adapters {active}: fedloom trains one")
    merged = next((layer_name(held) for held in lora_layers(model) if held.layer.merged), None)
    if merged is not None:
        raise ModelError(f"module {merged}: the adapter is merged into the base; call unmerge_adapter() before")
    return active[0]


def add_layers(model: peft.PeftModel, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Have a frozen slot on these modules too, for what others train there. Raises ModelError where there is none."""
    found = {name for held in lora_layers(model) for name in held.names}
    if shapes.keys() <= found:
        return
    linear = linear_beneath(model)
    for name in sorted(shapes.keys() - linear.keys()):
        raise ModelError(f"the run adapts module {name}, which the trainer's base model does not have as a linear one")
    for name in sorted(shapes.keys() - found):
        if linear[name].parameter:
            raise ModelError(
                f"the run adapts parameter {linear[name].parameter}, which the trainer's adapter leaves out: add it to "
                "target_parameters, since PEFT has all adapters of a model on the same parameters"
            )
    if FROZEN in model.peft_config:
        model.delete_adapter(FROZEN)
    add_frozen(model, shapes.keys() - found)


def add_frozen(model: peft.PeftModel, more: Collection[str]) -> None:
    """The frozen slot on every layer there is, and on `more` linear modules.

    Rank and alpha are made up: the slot is filled with pairs of any rank, and a scale of 1.
    """
    modules = {held.names[0] for held in lora_layers(model) if not held.parameter}
    # Every adapter of a model has to name its parameters by the same texts.
    told = (getattr(config, "target_parameters", None) for config in model.peft_config.values())
    named = next((parameters for parameters in told if parameters), None)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=1,
        lora_alpha=1,
        target_modules=sorted(modules.union(more)),
        target_parameters=None if named is None else list(named),
    )
    _wrap(model, config, FROZEN)
