"""PEFT models ⇄ LoraState. The only file that imports peft.

A model is wrapped once (`attach`); after that tensors are only swapped. It has two slots: the adapter that is trained,
and, on demand, a frozen one for merged increments; the model in use is W0 + frozen + trained. A model that somebody
else has wrapped may have another name for the trained slot (`slot`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from fedloom.adapters.patterns import literal_pattern
from fedloom.adapters.settings import lora_scale
from fedloom.errors import ModelError, ShapeError
from fedloom.lora.pair import PARTS, LoraPair, LoraState, core_matrix
from fedloom.model.placement import Adapter, LinearModule, Placement, linear_modules
from fedloom.records.config import LoraSettings

TRAINED = "default"
FROZEN = "fedloom_frozen"
"""No name that somebody would give an adapter of a model that he has wrapped himself."""


def attach(model: PreTrainedModel, adapter: Adapter) -> peft.PeftModel:
    """Wrap the base model, once, with a trainable adapter that changes nothing yet (B = 0)."""
    if isinstance(model, peft.PeftModel) or any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ModelError("the base model already carries an adapter: merge it into the base, or load the plain base")
    if getattr(model, "is_quantized", False):
        model = peft.prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=False
        )
    with _undisturbed():
        return peft.get_peft_model(model, _lora_config(adapter), adapter_name=TRAINED)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """PEFT draws starting values that are never used, and calls names that transformers has deprecated."""
    with torch.random.fork_rng(range(min(torch.cuda.device_count(), 1))), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _lora_config(adapter: Adapter) -> peft.LoraConfig:
    """PEFT's settings, with a pattern for each module alone: PEFT runs no expression that came with the settings."""
    lora, modules = adapter.lora, adapter.modules
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]
        target_modules=sorted(modules),
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        rank_pattern={literal_pattern(name): placed.rank for name, placed in modules.items() if placed.rank != lora.r},
        alpha_pattern={
            literal_pattern(name): placed.alpha for name, placed in modules.items() if placed.alpha != lora.lora_alpha
        },
        fan_in_fan_out=adapter.transposed,
    )


def configure(model: peft.PeftModel, adapter: Adapter) -> None:
    """Give the trained slot other alphas and another dropout, where clients differ; they hold from the next
    `write_adapter`.

    A module that the adapter is not on keeps its alpha: whoever does not train a module writes a pair of rank 0 there.
    """
    for name, layer in lora_layers(model):
        if name in adapter.modules:
            layer.lora_alpha[TRAINED] = adapter.modules[name].alpha
        dropout = adapter.lora.lora_dropout
        layer.use_rslora[TRAINED] = adapter.lora.use_rslora
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
    merged = next((name for name, layer in lora_layers(model) if layer.merged), None)
    if merged is not None:
        raise ModelError(f"module {merged}: the adapter is merged into the base; call unmerge_adapter() before")
    return active[0]


def placements(model: peft.PeftModel, slot: str) -> dict[str, Placement]:
    """Where a slot sits: module → shape, rank and alpha, in the model's order."""
    return {
        name: Placement(_size(layer), layer.r[slot], float(layer.lora_alpha[slot]))
        for name, layer in _slotted(model, slot)
    }


def uses_rslora(model: peft.PeftModel, slot: str) -> bool:
    """Whether a slot's scale is alpha / √rank."""
    return any(layer.use_rslora[slot] for _, layer in _slotted(model, slot))


def linear_beneath(model: peft.PeftModel) -> dict[str, LinearModule]:
    """`placement.linear_modules` of the base model, as if it were not wrapped."""
    wrapped = {name for name, _ in lora_layers(model)}
    base = cast(PreTrainedModel, model.get_base_model())
    found: dict[str, LinearModule] = {}
    for name, linear in linear_modules(base).items():
        plain = name.removesuffix(".base_layer")
        if plain == name and name.partition(".lora_")[0] in wrapped:
            continue  # a factor of an adapter
        found[plain] = linear
    return found


def widen_factors(model: peft.PeftModel, slot: str) -> None:
    """Hold the factors in float32: in bfloat16 most steps of a usual learning rate would round to nothing."""
    for _, layer in _slotted(model, slot):
        for factor in _factors(layer, slot):
            factor.weight.data = factor.weight.data.float()


def lora_layers(model: peft.PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Module name in the base model, and its LoRA layer."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _size(layer: LoraLayer) -> tuple[int, int]:
    """(m, n) of the module beneath."""
    return cast(int, layer.out_features), cast(int, layer.in_features)


def _factors(layer: LoraLayer, slot: str) -> tuple[nn.Linear, nn.Linear]:
    """The two linear maps of a slot, x → A x and A x → B A x."""
    return cast(nn.Linear, layer.lora_A[slot]), cast(nn.Linear, layer.lora_B[slot])


def _slotted(model: peft.PeftModel, slot: str) -> Iterator[tuple[str, LoraLayer]]:
    """The layers that have this slot: in a model of somebody else's, a layer may have the frozen one alone."""
    return ((name, layer) for name, layer in lora_layers(model) if slot in layer.lora_A)


def live_adapter(model: peft.PeftModel, slot: str = TRAINED) -> LoraState:
    """The trained adapter as the live parameters (B times the scale), for a penalty that gradients flow through."""
    pairs = {}
    for name, layer in _slotted(model, slot):
        down, up = _factors(layer, slot)
        pairs[name] = LoraPair(down.weight, up.weight * layer.scaling[slot])
    return LoraState(pairs)


def read_adapter(model: peft.PeftModel, slot: str = TRAINED) -> LoraState:
    """A copy of the trained adapter, float32 on the CPU, the scale folded into B."""
    with torch.no_grad():
        return live_adapter(model, slot).map(lambda pair: LoraPair(_copied(pair.A), _copied(pair.B)))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def write_adapter(model: peft.PeftModel, state: LoraState, slot: str = TRAINED) -> None:
    """Put a state into the trained slot, in place; ranks may differ from the slot's.

    The scale of a module follows from its alpha and the rank written. Raises ShapeError if the modules differ.
    """
    found = dict(_slotted(model, slot))
    odd = sorted(set(found) ^ set(state))
    if odd:
        where = "model" if odd[0] in state else "adapter"
        raise ShapeError(
            f"the {where} lacks module {odd[0]}: the adapter belongs to another base model or other targets"
        )
    for name, layer in found.items():
        scale = lora_scale(layer.lora_alpha[slot], state[name].rank, layer.use_rslora[slot])
        _fill(name, layer, slot, state[name], scale)


def _fill(name: str, layer: LoraLayer, slot: str, pair: LoraPair, scale: float) -> None:
    if pair.shape != _size(layer):
        raise ShapeError(
            f"module {name}: the adapter is for {pair.shape} out and in features, the base model has {_size(layer)}; "
            "it belongs to another base model"
        )
    layer.r[slot], layer.scaling[slot] = pair.rank, scale
    down, up = _factors(layer, slot)
    with torch.no_grad():
        _fill_linear(down, pair.A)
        _fill_linear(up, pair.B / scale)


def _fill_linear(linear: nn.Linear, values: Tensor) -> None:
    old = linear.weight
    if old.shape == values.shape:
        old.copy_(values)
        return
    linear.out_features, linear.in_features = values.shape
    new = values.detach().to(old.device, old.dtype, copy=True)
    linear.weight = nn.Parameter(new, requires_grad=old.requires_grad)


def set_trainable(model: peft.PeftModel, parts: Sequence[str], slot: str = TRAINED) -> None:
    """Let gradients reach only these factors ("A", "B") of the trained adapter."""
    for _, layer in _slotted(model, slot):
        for part, factor in zip(PARTS, _factors(layer, slot), strict=True):
            factor.weight.requires_grad_(part in parts)


@contextmanager
def training_core(model: peft.PeftModel, core: LoraState, slot: str = TRAINED) -> Iterator[None]:
    """While it lasts, A of each module in `core` is R V with V the core's A, and only the matrix R trains.

    An empty core changes nothing.
    """
    downs = [(_factors(layer, slot)[0], core[name].A) for name, layer in _slotted(model, slot) if core]
    for down, rows in downs:
        held = _Between(rows.to(down.weight.device, down.weight.dtype))
        parametrize.register_parametrization(down, "weight", held, unsafe=True)
        down.parametrizations.weight.original.requires_grad_(True)  # type: ignore[union-attr]
    try:
        yield
    finally:
        for down, _ in downs:
            product = down.weight.detach()
            parametrize.remove_parametrizations(down, "weight", leave_parametrized=False)
            down.weight = nn.Parameter(product)


class _Between(nn.Module):
    """R ↦ R V, and back."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix @ cast(Tensor, self.rows)

    def right_inverse(self, a: Tensor) -> Tensor:
        return core_matrix(a, cast(Tensor, self.rows))


def set_frozen(model: peft.PeftModel, state: LoraState | None, slot: str = TRAINED) -> None:
    """Add these fixed increments to the base (None or empty: none). A module may be absent; ranks are free.

    Both factors of the trained slot are trainable afterwards.
    """
    state = state or LoraState()
    found = dict(lora_layers(model))
    if set(state) - set(found):
        raise ShapeError(f"the model has no adapter on {min(set(state) - set(found))}, which the increments change")
    if state and FROZEN not in model.peft_config:
        _add_frozen(model, {name: _size(layer) for name, layer in found.items()})
    wanted = [slot, FROZEN] if state else [slot]
    tuner = cast(BaseTuner, model.base_model)
    if tuner.active_adapters != wanted:
        tuner.set_adapter(wanted)
    for name, layer in found.items() if state else ():
        m, n = _size(layer)
        _fill(name, layer, FROZEN, state.get(name) or LoraPair(torch.zeros(0, n), torch.zeros(m, 0)), 1.0)
        for factor in _factors(layer, FROZEN):
            factor.weight.requires_grad_(False)
    set_trainable(model, PARTS, slot)


def add_layers(model: peft.PeftModel, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Have a frozen slot on these modules too, for what others train there. Raises ModelError where there is none."""
    found = {name: _size(layer) for name, layer in lora_layers(model)}
    if shapes.keys() <= found.keys():
        return
    linear = linear_beneath(model)
    for name in sorted(shapes.keys() - linear.keys()):
        raise ModelError(f"the run adapts module {name}, which the trainer's base model does not have as a linear one")
    if FROZEN in model.peft_config:
        model.delete_adapter(FROZEN)
    _add_frozen(model, {**found, **shapes})


def _add_frozen(model: peft.PeftModel, shapes: Mapping[str, tuple[int, int]]) -> None:
    """The frozen slot on these modules. Rank and alpha are made up: `_fill` gives each its own, with a scale of 1."""
    empty = {name: Placement(shape, 1, 1.0) for name, shape in shapes.items()}
    with _undisturbed():
        model.add_adapter(FROZEN, _lora_config(Adapter(LoraSettings(r=1, lora_alpha=1.0), empty)))


def add_weighted(
    base: PreTrainedModel,
    folders: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    combination: str,
    rank: int | None,
) -> None:
    """PEFT's own merge, `add_weighted_adapter`, from folders to a folder; it needs the base model in memory.

    Raises ModelError where PEFT refuses the combination, as "linear" does for unequal ranks. The base is left plain.
    """
    names = [f"adapter{k}" for k in range(len(folders))]
    with _undisturbed():
        model = peft.PeftModel.from_pretrained(base, folders[0], adapter_name=names[0])
        for folder, name in zip(folders[1:], names[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
        tuner = cast(peft.LoraModel, model.base_model)
        try:
            tuner.add_weighted_adapter(names, list(weights), "merged", combination, svd_rank=rank)  # type: ignore[arg-type]
            # Else PEFT looks for the base on the Hub, to compare vocabularies.
            model.save_pretrained(str(out), selected_adapters=["merged"], save_embedding_layers=False)
        except ValueError as error:
            raise ModelError(f"PEFT's {combination}: {error}") from None
        finally:
            tuner.unload()
