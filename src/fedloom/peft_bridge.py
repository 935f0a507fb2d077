"""PEFT models ⇄ LoraState. The only file that imports peft.

A model is wrapped once (`attach`); after that tensors are only swapped. It has two slots: the adapter that is trained,
and, on demand, a frozen one for merged increments; the model in use is W0 + frozen + trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar, cast

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom.adapters import AdapterSettings, lora_scale
from fedloom.errors import ModelError, ShapeError
from fedloom.lora import PARTS, LoraPair, LoraState, between
from fedloom.patterns import Patterns, literal, matching_name

TRAINED = "default"
FROZEN = "frozen"
Value = TypeVar("Value")


def resolve(model: PreTrainedModel, settings: AdapterSettings) -> AdapterSettings:
    """The settings with target_modules spelled out as last parts of names, and fan_in_fan_out as the model needs it."""
    modules = targets(model, settings)
    names = settings.target_modules
    if names == "all-linear":
        names = sorted({name.rpartition(".")[2] for name in modules})
    transposed = any(isinstance(module, Conv1D) for module in modules.values())
    return replace(settings, target_modules=names, fan_in_fan_out=transposed)


def targets(model: PreTrainedModel, settings: AdapterSettings) -> dict[str, nn.Module]:
    """The linear modules that the settings name, by full name.

    Raises ModelError if a target matches none, ConfigError for a pattern that `patterns` does not take.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    wanted = settings.target_modules
    if wanted == "all-linear":
        output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        found = {name for name, module in linear.items() if module is not output}
    elif isinstance(wanted, str):
        found = matching_name(wanted, linear, "target_modules")
        _require(found, wanted, linear)
    else:
        found = set()
        for target in wanted:
            matched = {name for name in linear if name == target or name.endswith(f".{target}")}
            _require(matched, target, linear)
            found |= matched
    for pattern in (*settings.rank_pattern, *settings.alpha_pattern):
        alone = Patterns([pattern], "a rank or alpha pattern")
        _require({name for name in found if alone.key(name) is not None}, pattern, found)
    return {name: module for name, module in linear.items() if name in found}


def _require(found: set[str], target: str, names: Collection[str]) -> None:
    if found:
        return
    ends = sorted({name.rpartition(".")[2] for name in names})
    near = get_close_matches(target.rpartition(".")[2], ends, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"its linear modules end in {', '.join(ends)}"
    raise ModelError(f"target module {target!r} matches no linear module of the base model: {hint}")


def shapes(model: PreTrainedModel | peft.PeftModel, settings: AdapterSettings) -> dict[str, tuple[int, int]]:
    """Module name → (m, n), out and in features, of every module that gets an adapter."""
    if isinstance(model, peft.PeftModel):
        return {name: _size(layer) for name, layer in layers(model)}
    return {name: _shape(module) for name, module in targets(model, settings).items()}


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def ranks(model: PreTrainedModel | peft.PeftModel, settings: AdapterSettings) -> dict[str, int]:
    """Module name → rank that the settings give it."""
    return {module: settings.rank(module) for module in shapes(model, settings)}


def attach(model: PreTrainedModel, settings: AdapterSettings) -> peft.PeftModel:
    """Wrap the base model, once, with a trainable adapter that changes nothing yet (B = 0)."""
    if isinstance(model, peft.PeftModel) or any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ModelError("the base model already carries an adapter: merge it into the base, or load the plain base")
    settings = resolve(model, settings)
    names = sorted(targets(model, settings))
    if getattr(model, "is_quantized", False):
        model = peft.prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=False
        )
    with _undisturbed():
        return peft.get_peft_model(model, _lora_config(settings, names), adapter_name=TRAINED)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """PEFT draws starting values that are never used, and calls names that transformers has deprecated."""
    with torch.random.fork_rng(range(min(torch.cuda.device_count(), 1))), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _lora_config(settings: AdapterSettings, names: Sequence[str]) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        target_modules=list(names),
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        rank_pattern=_literal_keys(settings.rank_pattern, settings.rank, names),
        alpha_pattern=_literal_keys(settings.alpha_pattern, settings.alpha, names),
        fan_in_fan_out=settings.fan_in_fan_out,
    )


def _literal_keys(
    patterns: Mapping[str, Value], chosen: Callable[[str], Value], modules: Sequence[str]
) -> dict[str, Value]:
    """One pattern for each module, which matches no other: PEFT runs no expression that came with the settings."""
    return {literal(module): chosen(module) for module in modules} if patterns else {}


def configure(model: peft.PeftModel, settings: AdapterSettings) -> None:
    """Give the trained slot other alphas and another dropout, where clients differ; they hold from the next `write`."""
    for name, layer in layers(model):
        layer.lora_alpha[TRAINED] = settings.alpha(name)
        layer.use_rslora[TRAINED] = settings.use_rslora
        layer.lora_dropout[TRAINED] = nn.Dropout(settings.lora_dropout) if settings.lora_dropout else nn.Identity()


def layers(model: peft.PeftModel) -> Iterator[tuple[str, LoraLayer]]:
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


def live(model: peft.PeftModel) -> LoraState:
    """The trained adapter as the live parameters (B times the scale), for a penalty that gradients flow through."""
    pairs = {}
    for name, layer in layers(model):
        down, up = _factors(layer, TRAINED)
        pairs[name] = LoraPair(down.weight, up.weight * layer.scaling[TRAINED])
    return LoraState(pairs)


def read(model: peft.PeftModel) -> LoraState:
    """A copy of the trained adapter, float32 on the CPU, the scale folded into B."""
    with torch.no_grad():
        return live(model).map(lambda pair: LoraPair(_copied(pair.A), _copied(pair.B)))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def write(model: peft.PeftModel, state: LoraState) -> None:
    """Put a state into the trained slot, in place; ranks may differ from the slot's.

    The scale of a module follows from its alpha and the rank written. Raises ShapeError if the modules differ.
    """
    found = dict(layers(model))
    odd = sorted(set(found) ^ set(state))
    if odd:
        where = "model" if odd[0] in state else "adapter"
        raise ShapeError(
            f"the {where} lacks module {odd[0]}: the adapter belongs to another base model or other targets"
        )
    for name, layer in found.items():
        scale = lora_scale(layer.lora_alpha[TRAINED], state[name].rank, layer.use_rslora[TRAINED])
        _fill(name, layer, TRAINED, state[name], scale)


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


def set_trainable(model: peft.PeftModel, parts: Sequence[str]) -> None:
    """Let gradients reach only these factors ("A", "B") of the trained adapter."""
    for _, layer in layers(model):
        for part, factor in zip(PARTS, _factors(layer, TRAINED), strict=True):
            factor.weight.requires_grad_(part in parts)


@contextmanager
def training_core(model: peft.PeftModel, core: LoraState) -> Iterator[None]:
    """While it lasts, A of each module in `core` is R V with V the core's A, and only the matrix R (r × r) trains.

    An empty core changes nothing.
    """
    downs = [(_factors(layer, TRAINED)[0], core[name].A) for name, layer in layers(model) if core]
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
        return between(a, cast(Tensor, self.rows))


def set_frozen(model: peft.PeftModel, state: LoraState | None) -> None:
    """Add these fixed increments to the base (None or empty: none). A module may be absent; ranks are free.

    Both factors of the trained slot are trainable afterwards.
    """
    state = state or LoraState()
    found = dict(layers(model))
    if set(state) - set(found):
        raise ShapeError(f"the model has no adapter on {min(set(state) - set(found))}, which the increments change")
    if state and FROZEN not in model.peft_config:
        with _undisturbed():
            model.add_adapter(FROZEN, _lora_config(AdapterSettings(r=1), sorted(found)))
    wanted = [TRAINED, FROZEN] if state else [TRAINED]
    tuner = cast(BaseTuner, model.base_model)
    if tuner.active_adapters != wanted:
        tuner.set_adapter(wanted)
    for name, layer in found.items() if state else ():
        m, n = _size(layer)
        _fill(name, layer, FROZEN, state.get(name) or LoraPair(torch.zeros(0, n), torch.zeros(m, 0)), 1.0)
        for factor in _factors(layer, FROZEN):
            factor.weight.requires_grad_(False)
    set_trainable(model, PARTS)


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
