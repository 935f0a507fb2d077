"""What of a base model takes an adapter, and by which name: linear modules, and parameters such as stacked experts."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import cast

import peft
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import transformers_weight_conversion
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom.adapters.parameters import WRAPPED, matrix_names
from fedloom.model.placement import LinearModule

_MATRIX_OWNERS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, LoraLayer)
"""Modules whose parameters are adapted as the module, or not at all."""
_ROUTED = re.compile(r"expert|moe|router|gate|topk", re.IGNORECASE)
"""In the name of a module, or of its class, that belongs to a mixture: its own parameters are matrices."""


def linear_modules(model: PreTrainedModel) -> dict[str, LinearModule]:
    """Every place for a pair by its full name, in the model's order.

    Of a model that sees or hears too, the language model alone: the texts of clients train nothing else.
    """
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    modules = dict(model.named_modules())
    inside = _language_names(model, modules)
    found: dict[str, LinearModule] = {}
    for name in inside:
        module = modules[name]
        if isinstance(module, nn.Linear | Conv1D):
            found[name] = _describe(name, module, module is output)
        elif not isinstance(module, _MATRIX_OWNERS) and _ROUTED.search(f"{name} {type(module).__name__}"):
            found |= _matrices(name, module)
    return _marked(model, found, modules)


def linear_beneath(model: peft.PeftModel) -> dict[str, LinearModule]:
    """`linear_modules` of the base model, as if it were not wrapped."""
    base = cast(PreTrainedModel, model.get_base_model())
    wrapped = {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    found: dict[str, LinearModule] = {}
    for name, linear in linear_modules(base).items():
        if ".lora_" in name and name.partition(".lora_")[0] in wrapped:
            continue  # a factor of an adapter
        found[name.replace(WRAPPED, "")] = replace(linear, parameter=linear.parameter.replace(WRAPPED, ""))
    return found


def _describe(name: str, module: nn.Linear | Conv1D, output: bool) -> LinearModule:
    if isinstance(module, Conv1D):
        n, m = module.weight.shape
        return LinearModule((m, n), transposed=True, output=output)
    return LinearModule((module.out_features, module.in_features), output=output)


def _matrices(name: str, module: nn.Module) -> dict[str, LinearModule]:
    """A place for each matrix of a module's own parameters: those of three dimensions, and a weight of two."""
    found: dict[str, LinearModule] = {}
    for own, parameter in module.named_parameters(recurse=False):
        if not name or not (parameter.dim() == 3 or parameter.dim() == 2 and own == "weight"):
            continue
        count, n, m = parameter.shape if parameter.dim() == 3 else (1, parameter.shape[1], parameter.shape[0])
        # As PEFT has it: (experts, out, in), but for modules that say they are transposed.
        if parameter.dim() == 3 and not getattr(module, "is_transposed", False):
            m, n = n, m
        full = f"{name}.{own}"
        found |= dict.fromkeys(matrix_names(full, count), LinearModule((m, n), parameter=full))
    return found


def _language_names(model: PreTrainedModel, modules: dict[str, nn.Module]) -> list[str]:
    """The names of all modules but those of a vision or audio part, in the model's order."""
    if model.config.get_text_config() is model.config:
        return list(modules)
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    inside = next((name for name, module in modules.items() if module is decoder), "")
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return [n for n, m in modules.items() if not inside or n == inside or n.startswith(f"{inside}.") or m is output]


def _marked(
    model: PreTrainedModel, found: dict[str, LinearModule], modules: dict[str, nn.Module]
) -> dict[str, LinearModule]:
    """With what PEFT makes of the names."""
    # In a model that is wrapped already, by the names that it had before.
    ends = {name: name.replace(WRAPPED, "").rpartition(".")[2] for name in found}
    rest = {name for name in modules.keys() - found.keys() if not isinstance(modules[name], LoraLayer)}
    beside = Counter(name.replace(WRAPPED, "").rpartition(".")[2] for name in rest if ".lora_" not in name)
    moved = _moved_ends(model)
    reasons = {end: _refusal(model, end) for end in set(ends.values())}
    odd = {name: _not_linear(modules[name]) for name, place in found.items() if not place.parameter}
    return {
        name: replace(
            place,
            moved=not place.parameter and ends[name] in moved,
            shared_end=bool(beside[ends[name]]),
            refused="" if place.parameter else odd[name] or reasons[ends[name]],
        )
        for name, place in found.items()
    }


def _moved_ends(model: PreTrainedModel) -> set[str]:
    """Last parts of names that PEFT takes for experts as older releases of transformers had them.

    It does so for mixtures that transformers has since given one parameter for all experts, and also where a module of
    this name is no expert's: DeepSeek's first layers, and shared experts.
    """
    known = vars(transformers_weight_conversion)["_MODEL_TO_CONVERSION_PATTERN"]
    kind = known.get(getattr(model.config, "model_type", ""))
    return set(transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING.get(kind or "", {}))


def _not_linear(module: nn.Module) -> str:
    """Why a module is linear in name only; "" where it is. Some routers return more than a product."""
    kind = type(module)
    if kind.forward is nn.Linear.forward or not re.search("router|topk|grouped", kind.__name__, re.IGNORECASE):
        return ""
    return f"PEFT adapts no {kind.__name__}, whose output is not that of a linear module"


def _refusal(model: PreTrainedModel, end: str) -> str:
    """Why PEFT adapts no module of this name in this model; "" if it does."""
    probe = peft.LoraConfig()
    try:
        LoraModel._check_target_module_compatiblity(cast(LoraModel, None), probe, model, end)
    except ValueError:
        return f"PEFT adapts no {end} in a model of type {model.config.model_type}, whose kernels read its weights"
    return ""
