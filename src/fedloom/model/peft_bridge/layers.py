"""PEFT's LoRA layers on a model: a linear module's, or a parameter's of many matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import peft
import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from fedloom.adapters.parameters import WRAPPED, join_pairs, matrix_names, parameter_stem, split_pair
from fedloom.lora.pair import LoraPair

TRAINED = "default"
BASE = "base_layer"
"""What PEFT calls the module that a layer wraps."""
FROZEN = "fedloom_frozen"
"""No name that somebody would give an adapter of a model that he has wrapped himself."""


@dataclass(frozen=True, eq=False, slots=True)
class AdaptedLayer:
    """One of PEFT's layers. names: of its pairs: the module's, or one for each matrix of a parameter."""

    names: tuple[str, ...]
    layer: LoraLayer
    parameter: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(m, n) of each pair."""
        return cast(int, self.layer.out_features), cast(int, self.layer.in_features)

    def factors(self, slot: str) -> tuple[nn.Linear, nn.Linear]:
        """The two linear maps of a slot, x → A x and A x → B A x; of a parameter those of all its matrices."""
        return cast(nn.Linear, self.layer.lora_A[slot]), cast(nn.Linear, self.layer.lora_B[slot])

    def ranks(self, slot: str) -> tuple[int, ...]:
        """The rank of each pair; PEFT holds the matrices of a parameter at one rank, filled up with zeros."""
        held = cast(dict[str, tuple[int, ...]], getattr(self.layer, "fedloom_ranks", {}))
        return held.get(slot) or (self.layer.r[slot],) * len(self.names)

    def pairs(self, slot: str) -> dict[str, LoraPair]:
        """The live parameters, B times the scale."""
        down, up = self.factors(slot)
        whole = LoraPair(down.weight, up.weight * self.layer.scaling[slot])
        if not self.parameter:
            return {self.names[0]: whole}
        cut = zip(split_pair(whole, len(self.names)), self.ranks(slot), strict=True)
        return dict(zip(self.names, (LoraPair(pair.A[:rank], pair.B[:, :rank]) for pair, rank in cut), strict=True))

    def fill(self, slot: str, pairs: Sequence[LoraPair], scale: float) -> None:
        """Put pairs of any ranks into a slot, one for each name. scale: what the layer is to multiply B A by."""
        whole = join_pairs(pairs) if self.parameter else pairs[0]
        self.layer.r[slot], self.layer.scaling[slot] = whole.rank // len(self.names), scale
        if self.parameter:
            held = getattr(self.layer, "fedloom_ranks", {})
            self.layer.fedloom_ranks = {**held, slot: tuple(pair.rank for pair in pairs)}  # type: ignore[attr-defined]
        down, up = self.factors(slot)
        with torch.no_grad():
            _fill_linear(down, whole.A)
            if _is_like(up.weight, whole.B):
                torch.div(whole.B, scale, out=up.weight)
            else:
                _fill_linear(up, whole.B / scale)


def _is_like(held: Tensor, values: Tensor) -> bool:
    """Whether what is computed of the values can be written where it is held, without a copy."""
    return (held.shape, held.dtype, held.device) == (values.shape, values.dtype, values.device)


def _fill_linear(linear: nn.Linear, values: Tensor) -> None:
    old = linear.weight
    if old.shape == values.shape:
        old.copy_(values)
        return
    linear.out_features, linear.in_features = values.shape
    new = values.detach().to(old.device, old.dtype, copy=True)
    linear.weight = nn.Parameter(new, requires_grad=old.requires_grad)


def lora_layers(model: peft.PeftModel) -> Iterator[AdaptedLayer]:
    """The layers in the model's order, those of one module's parameters from the last to the first.

    Of PEFT's layers what they wrap is looked at alone: a round asks several times, and PEFT makes ten modules of one.
    """
    seen: set[nn.Module] = set()
    ahead: list[tuple[str, nn.Module]] = [("", model.get_base_model())]
    while ahead:
        path, module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        kind = _layer_kind(type(module))  # type: ignore[arg-type]  # taken for an object
        if kind is ParamWrapper:
            wrapper = cast(ParamWrapper, module)
            parameter = f"{path.replace(WRAPPED, '')}.{wrapper.parameter_name}"
            yield AdaptedLayer(tuple(matrix_names(parameter, wrapper.num_experts)), wrapper, parameter)
        elif kind is LoraLayer:
            yield AdaptedLayer((path,), cast(LoraLayer, module))
        inside = module._modules.items()
        if kind is not None:
            inside = {name: child for name, child in inside if name == BASE}.items()
        ahead += [(f"{path}.{name}" if path else name, child) for name, child in reversed(inside) if child is not None]


@cache
def _layer_kind(kind: type[nn.Module]) -> type[LoraLayer] | None:
    """Which of PEFT's layers a module of this class is. PEFT's classes take long to ask."""
    return next((layer for layer in (ParamWrapper, LoraLayer) if issubclass(kind, layer)), None)


def slotted_layers(model: peft.PeftModel, slot: str) -> list[AdaptedLayer]:
    """The layers that have this slot: in a model of somebody else's, a layer may have the frozen one alone."""
    return [held for held in lora_layers(model) if slot in held.layer.lora_A]


def layer_name(held: AdaptedLayer) -> str:
    """What an error calls the layer."""
    return parameter_stem(held.parameter) or held.names[0]
