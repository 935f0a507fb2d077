"""Tensors in and out of the slots of a wrapped model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import peft
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedloom.adapters.settings import lora_scale
from fedloom.errors import ShapeError
from fedloom.lora.pair import PARTS, LoraPair, LoraState, core_matrix
from fedloom.model.peft_bridge.attach import add_frozen
from fedloom.model.peft_bridge.layers import FROZEN, TRAINED, AdaptedLayer, lora_layers, slotted_layers
from fedloom.model.placement import Placement


def placements(model: peft.PeftModel, slot: str) -> dict[str, Placement]:
    """Where a slot sits: module → shape, rank and alpha, in the model's order."""
    return {
        name: Placement(held.size, rank, float(held.layer.lora_alpha[slot]))
        for held in slotted_layers(model, slot)
        for name, rank in zip(held.names, held.ranks(slot), strict=True)
    }


def uses_rslora(model: peft.PeftModel, slot: str) -> bool:
    """Whether a slot's scale is alpha / √rank."""
    return any(held.layer.use_rslora[slot] for held in slotted_layers(model, slot))


def widen_factors(model: peft.PeftModel, slot: str) -> None:
    """Hold the factors in float32: in bfloat16 most steps of a usual learning rate would round to nothing."""
    for held in slotted_layers(model, slot):
        for factor in held.factors(slot):
            factor.weight.data = factor.weight.data.float()


def live_adapter(model: peft.PeftModel, slot: str = TRAINED) -> LoraState:
    """The trained adapter as the live parameters (B times the scale), for a penalty that gradients flow through."""
    return LoraState({name: pair for held in slotted_layers(model, slot) for name, pair in held.pairs(slot).items()})


def read_adapter(model: peft.PeftModel, slot: str = TRAINED) -> LoraState:
    """A copy of the trained adapter, float32 on the CPU, the scale folded into B."""
    found: dict[str, LoraPair] = {}
    with torch.no_grad():
        for held in slotted_layers(model, slot):
            # B times the scale is new already, but for matrices that are cut out of a parameter's.
            found |= {
                name: LoraPair(_copied(pair.A), _copied(pair.B, copy=bool(held.parameter)))
                for name, pair in held.pairs(slot).items()
            }
    return LoraState(found)


def _copied(tensor: Tensor, *, copy: bool = True) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=copy, memory_format=torch.contiguous_format)


def write_adapter(model: peft.PeftModel, state: LoraState, slot: str = TRAINED) -> None:
    """Put a state into the trained slot, in place; ranks may differ from the slot's.

    The scale of a module follows from its alpha and the rank written; of a parameter, from the largest rank among its
    matrices. Raises ShapeError if the modules differ.
    """
    found = slotted_layers(model, slot)
    odd = sorted({name for held in found for name in held.names} ^ set(state))
    if odd:
        where = "model" if odd[0] in state else "adapter"
        raise ShapeError(
            f"the {where} lacks module {odd[0]}: the adapter belongs to another base model or other targets"
        )
    for held in found:
        pairs = [state[name] for name in held.names]
        rank = max(pair.rank for pair in pairs)
        _fill(held, slot, pairs, lora_scale(held.layer.lora_alpha[slot], rank, held.layer.use_rslora[slot]))


def _fill(held: AdaptedLayer, slot: str, pairs: Sequence[LoraPair], scale: float) -> None:
    for name, pair in zip(held.names, pairs, strict=True):
        if pair.shape != held.size:
            raise ShapeError(
                f"module {name}: the adapter is for {pair.shape} out and in features, the base model has {held.size}; "
                "it belongs to another base model"
            )
    held.fill(slot, pairs, scale)


def set_trainable(model: peft.PeftModel, parts: Sequence[str], slot: str = TRAINED) -> None:
    """Let gradients reach only these factors ("A", "B") of the trained adapter."""
    for held in slotted_layers(model, slot):
        for part, factor in zip(PARTS, held.factors(slot), strict=True):
            factor.weight.requires_grad_(part in parts)


@contextmanager
def training_core(model: peft.PeftModel, core: LoraState, slot: str = TRAINED) -> Iterator[None]:
    """While it lasts, A of each module in `core` is R V with V the core's A, and only the matrix R trains.

    An empty core changes nothing.
    """
    held_layers = slotted_layers(model, slot) if core else []
    downs = [(held.factors(slot)[0], _rows(held, core)) for held in held_layers]
    for down, rows in downs:
        between = _Between(rows.to(down.weight.device, down.weight.dtype))
        parametrize.register_parametrization(down, "weight", between, unsafe=True)
        down.parametrizations.weight.original.requires_grad_(True)  # type: ignore[union-attr]
    try:
        yield
    finally:
        for down, _ in downs:
            product = down.weight.detach()
            parametrize.remove_parametrizations(down, "weight", leave_parametrized=False)
            down.weight = nn.Parameter(product)


def factor_maps(model: peft.PeftModel, slot: str = TRAINED) -> Iterator[tuple[nn.Linear, Tensor | None]]:
    """The linear maps of a slot, x → A x and x → B A x of every layer; with one of `training_core` its rows V."""
    for held in slotted_layers(model, slot):
        for factor in held.factors(slot):
            rows = None
            if parametrize.is_parametrized(factor, "weight"):
                rows = cast(Tensor, factor.parametrizations.weight[0].rows)  # type: ignore[union-attr,index]
            yield factor, rows


def _rows(held: AdaptedLayer, core: LoraState) -> Tensor:
    """V of a module (r, n), or of all matrices of a parameter (E, r, n)."""
    rows = [core[name].A for name in held.names]
    return torch.stack(rows) if held.parameter else rows[0]


class _Between(nn.Module):
    """R ↦ R V, and back; for a parameter of E matrices R is (E, r, r), and the products lie one after another."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, matrix: Tensor) -> Tensor:
        product = matrix @ cast(Tensor, self.rows)
        return product.flatten(0, 1) if product.dim() == 3 else product

    def right_inverse(self, a: Tensor) -> Tensor:
        rows = cast(Tensor, self.rows)
        if rows.dim() == 2:
            return core_matrix(a, rows)
        return torch.stack([core_matrix(*both) for both in zip(a.chunk(len(rows)), rows, strict=True)])


def set_frozen(model: peft.PeftModel, state: LoraState | None, slot: str = TRAINED) -> None:
    """Add these fixed increments to the base (None or empty: none). A module may be absent; ranks are free.

    Both factors of the trained slot are trainable afterwards.
    """
    state = state or LoraState()
    found = list(lora_layers(model))
    names = {name for held in found for name in held.names}
    if set(state) - names:
        raise ShapeError(f"the model has no adapter on {min(set(state) - names)}, which the increments change")
    if state and FROZEN not in model.peft_config:
        add_frozen(model, ())
    wanted = [slot, FROZEN] if state else [slot]
    tuner = cast(BaseTuner, model.base_model)
    if tuner.active_adapters != wanted:
        tuner.set_adapter(wanted)
    for held in found if state else ():
        m, n = held.size
        empty = LoraPair(torch.zeros(0, n), torch.zeros(m, 0))
        _fill(held, FROZEN, [state.get(name) or empty for name in held.names], 1.0)
        for factor in held.factors(FROZEN):
            factor.weight.requires_grad_(False)
    set_trainable(model, PARTS, slot)
