"""Where an adapter sits in a base model: on which modules, with which rank and alpha.

The base model is walked once (`linear_modules`). All else is arithmetic on dictionaries, for each client's [lora].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom.adapters.patterns import Patterns
from fedloom.adapters.settings import AdapterSettings
from fedloom.errors import ModelError
from fedloom.records.config import LoraSettings

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class LinearModule:
    """A linear module of a base model.

    shape: (m, n), out and in features. transposed: its weights are stored as (n, m), as GPT-2's are. output: it gives
    the logits.
    """

    shape: tuple[int, int]
    transposed: bool = False
    output: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """An adapter on one module of shape (m, n): its rank and alpha."""

    shape: tuple[int, int]
    rank: int
    alpha: float


@dataclass(frozen=True, eq=False, slots=True)
class Adapter:
    """[lora] as one client or the server has it, and what it comes to on every module, in the model's order.

    transposed: some of the modules store their weights transposed (PEFT's fan_in_fan_out).
    """

    lora: LoraSettings
    modules: Mapping[str, Placement]
    transposed: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module → (m, n)."""
        return {module: placement.shape for module, placement in self.modules.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Module → rank."""
        return {module: placement.rank for module, placement in self.modules.items()}

    @property
    def settings(self) -> AdapterSettings:
        """What an adapter folder says of it."""
        return AdapterSettings(**self.lora.model_dump(), fan_in_fan_out=self.transposed)


def linear_modules(model: PreTrainedModel) -> dict[str, LinearModule]:
    """Every linear module of a base model by its full name, in the model's order."""
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found: dict[str, LinearModule] = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            n, m = module.weight.shape
            found[name] = LinearModule((m, n), transposed=True, output=module is output)
        elif isinstance(module, nn.Linear):
            found[name] = LinearModule((module.out_features, module.in_features), output=module is output)
    return found


def place_adapter(linear: Mapping[str, LinearModule], lora: LoraSettings) -> Adapter:
    """The adapter that [lora] puts on these modules.

    Raises ModelError where a target or a pattern matches none, ConfigError for a pattern that `patterns` does not take.
    """
    names = target_names(linear, lora)
    for pattern in (*lora.rank_pattern, *lora.alpha_pattern):
        alone = Patterns([pattern], "a rank or alpha pattern")
        _check_found(any(alone.key(name) is not None for name in names), pattern, names)
    ranks = _values(lora.rank_pattern, lora.r, names)
    alphas = _values(lora.alpha_pattern, lora.lora_alpha, names)
    modules = {name: Placement(linear[name].shape, ranks[name], alphas[name]) for name in names}
    return Adapter(lora, modules, any(linear[name].transposed for name in names))


def target_names(linear: Mapping[str, LinearModule], lora: LoraSettings) -> list[str]:
    """The modules that target_modules names. Raises ModelError if one of its entries matches none."""
    if lora.target_modules == "all-linear":
        return [name for name, module in linear.items() if not module.output]
    for target in lora.target_modules:
        _check_found(any(_ends_in(name, target) for name in linear), target, linear)
    return [name for name in linear if any(_ends_in(name, target) for target in lora.target_modules)]


def keep_fitting_patterns(lora: LoraSettings, modules: Collection[str]) -> LoraSettings:
    """[lora] without those patterns that none of the modules matches."""

    def kept(patterns: Mapping[str, Value]) -> dict[str, Value]:
        alone = {key: Patterns([key], "a rank or alpha pattern") for key in patterns}
        return {k: v for k, v in patterns.items() if any(alone[k].key(name) is not None for name in modules)}

    return lora.model_copy(update={"rank_pattern": kept(lora.rank_pattern), "alpha_pattern": kept(lora.alpha_pattern)})


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _values(patterns: Mapping[str, Value], default: Value, names: Collection[str]) -> dict[str, Value]:
    """Name → the value of the first pattern that matches it, or the default."""
    table = Patterns(patterns, "a rank or alpha pattern")
    keys = {name: table.key(name) for name in names}
    return {name: default if key is None else patterns[key] for name, key in keys.items()}


def _check_found(found: bool, target: str, names: Collection[str]) -> None:
    if found:
        return
    ends = sorted({name.rpartition(".")[2] for name in names})
    near = get_close_matches(target.rpartition(".")[2], ends, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"its linear modules end in {', '.join(ends)}"
    raise ModelError(f"target module {target!r} matches no linear module of the base model: {hint}")
