"""Where an adapter sits in a base model: on which modules, with which rank and alpha.

The base model is walked once (`peft_bridge.linear_modules`). All else is arithmetic on dictionaries, for each client's
[lora].
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import TypeVar

from fedloom.adapters.parameters import bundle_of
from fedloom.adapters.patterns import Patterns, matching_name
from fedloom.adapters.settings import AdapterSettings
from fedloom.errors import ConfigError, ModelError
from fedloom.records.config import LoraSettings

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class LinearModule:
    """A place for one pair: a linear module of a base model, or one matrix of a parameter, such as one expert's.

    shape: (m, n), out and in features. transposed: a module's weights are stored as (n, m), as GPT-2's are. output: it
    gives the logits. parameter: the parameter's full name where lora.target_parameters alone can name the place.
    moved: PEFT takes the module's name for an expert's of older releases, so that an adapter folder has to name its
    weight as a parameter. shared_end: the last part of the name is also that of something that takes no adapter.
    refused: why PEFT cannot adapt the module.
    """

    shape: tuple[int, int]
    transposed: bool = False
    output: bool = False
    parameter: str = ""
    moved: bool = False
    shared_end: bool = False
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """An adapter on one module of shape (m, n): its rank and alpha."""

    shape: tuple[int, int]
    rank: int
    alpha: float


@dataclass(frozen=True, eq=False, slots=True)
class Adapter:
    """[lora] as one client or the server has it, and what it comes to on every module, in the model's order.

    transposed: some of the modules store their weights transposed (PEFT's fan_in_fan_out). stacked: the parameters that
    are adapted as such. parameters: what an adapter folder names in target_parameters: these, and weights of modules
    that PEFT would take for something else (`LinearModule.moved`). targets: target_modules as a folder has to say it,
    where that is not what [lora] says.
    """

    lora: LoraSettings
    modules: Mapping[str, Placement]
    transposed: bool = False
    stacked: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    targets: tuple[str, ...] | None = None
    ranks: Mapping[str, int] = field(init=False, repr=False, compare=False)
    """Module → rank; the same object at every look, so that ten thousand clients of one adapter share it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", {module: placement.rank for module, placement in self.modules.items()})

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module → (m, n)."""
        return {module: placement.shape for module, placement in self.modules.items()}

    @property
    def settings(self) -> AdapterSettings:
        """What an adapter folder says of it."""
        lora = self.lora
        settings = AdapterSettings(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            target_modules=lora.target_modules if self.targets is None else self.targets,
            target_parameters=self.parameters,
            # PEFT has no dropout on a parameter, and opens no adapter that says otherwise.
            lora_dropout=0.0 if self.parameters else lora.lora_dropout,
            use_rslora=lora.use_rslora,
            rank_pattern=lora.rank_pattern,
            alpha_pattern=lora.alpha_pattern,
            fan_in_fan_out=self.transposed,
        )
        return settings if not self.parameters else self._spelled_out(settings)

    def _spelled_out(self, settings: AdapterSettings) -> AdapterSettings:
        """With a pattern for each place alone: PEFT knows a module that it takes for a parameter by another name."""
        places = {settings.place(module): placed for module, placed in self.modules.items()}
        lora = self.lora
        ranks = {name: placed.rank for name, placed in places.items() if placed.rank != lora.r}
        alphas = {name: placed.alpha for name, placed in places.items() if placed.alpha != lora.lora_alpha}
        return replace(settings, rank_pattern=ranks, alpha_pattern=alphas)


def place_adapter(linear: Mapping[str, LinearModule], lora: LoraSettings) -> Adapter:
    """The adapter that [lora] puts on these modules.

    Raises ModelError where a target or a pattern matches none, or a module that PEFT cannot adapt; ConfigError for a
    pattern that `patterns` does not take, and for dropout on parameters.
    """
    names = target_names(linear, lora)
    keys = {name: pattern_key(name, linear) for name in names}
    for pattern in (*lora.rank_pattern, *lora.alpha_pattern):
        alone = Patterns([pattern], "a rank or alpha pattern")
        _check_found(any(alone.key(key) is not None for key in keys.values()), pattern, keys.values())
    ranks = _values(lora.rank_pattern, lora.r, keys)
    alphas = _values(lora.alpha_pattern, lora.lora_alpha, keys)
    modules = {name: Placement(linear[name].shape, ranks[name], alphas[name]) for name in names}
    moved = {name: f"{name}.weight" if linear[name].moved else linear[name].parameter for name in names}
    return Adapter(
        lora,
        modules,
        transposed=any(linear[name].transposed for name in names),
        stacked=tuple(dict.fromkeys(linear[name].parameter for name in names if linear[name].parameter)),
        parameters=tuple(dict.fromkeys(parameter for parameter in moved.values() if parameter)),
        targets=_folder_targets(linear, lora, [name for name, parameter in moved.items() if not parameter]),
    )


def pattern_key(name: str, linear: Mapping[str, LinearModule]) -> str:
    """What rank and alpha patterns are matched against: a module's name, or a parameter's, for all its matrices."""
    return linear[name].parameter or name


def _folder_targets(
    linear: Mapping[str, LinearModule], lora: LoraSettings, modules: Sequence[str]
) -> tuple[str, ...] | None:
    """Full names where PEFT would find more than these modules by what [lora] says, or could not read it; else None.

    Whoever opens a folder matches its targets against every module of the model, those beside the language model too.
    """
    told = lora.target_modules
    ends = tuple({name.rpartition(".")[2] for name in modules}) if told == "all-linear" else told
    if isinstance(ends, str):
        return tuple(sorted(modules))
    reached = {name for name, module in linear.items() if any(_ends_in(name, end) for end in ends)}
    exact = reached == set(modules) and not any(linear[name].shared_end for name in modules)
    return None if exact else tuple(sorted(modules))


def target_names(linear: Mapping[str, LinearModule], lora: LoraSettings) -> list[str]:
    """The modules that target_modules names, and the matrices of the parameters that target_parameters names.

    Raises ModelError if one of the entries matches none, or a module that PEFT cannot adapt.
    """
    chosen = {*_named_modules(linear, lora.target_modules), *_named_matrices(linear, lora)}
    if not chosen:
        raise ModelError(
            'lora.target_modules names no module: name some, or use "all-linear" or lora.target_parameters'
        )
    return [name for name in linear if name in chosen]


def _named_modules(linear: Mapping[str, LinearModule], targets: Sequence[str] | str) -> list[str]:
    modules = {name: module for name, module in linear.items() if not module.parameter}
    if targets == "all-linear":
        return [name for name, module in modules.items() if not (module.output or module.refused)]
    if isinstance(targets, str):
        found = matching_name(targets, modules, "lora.target_modules")
        if not found:
            raise ModelError(
                f"lora.target_modules = {targets!r} matches the whole name of no linear module: as in PEFT, a text is "
                f'a regular expression for whole names; for ends of names give a list, ["{targets}"]'
            )
    else:
        for target in targets:
            _check_found(any(_ends_in(name, target) for name in modules), target, modules)
        found = {name for name in modules if any(_ends_in(name, target) for target in targets)}
    for name in sorted(found):
        if modules[name].refused:
            raise ModelError(f"target module {name}: {modules[name].refused}; leave it out of lora.target_modules")
    return list(found)


def _named_matrices(linear: Mapping[str, LinearModule], lora: LoraSettings) -> list[str]:
    """The matrices of the parameters that target_parameters names; a module's weight is the module itself."""
    if not lora.target_parameters:
        return []
    if lora.lora_dropout:
        raise ConfigError(
            f"lora.lora_dropout is {lora.lora_dropout:g}, and lora.target_parameters is set: PEFT has no dropout on "
            "parameters; set lora.lora_dropout = 0"
        )
    owners = {name: module.parameter or f"{name}.weight" for name, module in linear.items()}
    for target in lora.target_parameters:
        if not any(_ends_in(owner, target) for owner in owners.values()):
            raise ModelError(_no_parameter(target, linear))
    return [name for name, owner in owners.items() if any(_ends_in(owner, end) for end in lora.target_parameters)]


def _no_parameter(target: str, linear: Mapping[str, LinearModule]) -> str:
    ends = parameter_ends(linear)
    hint = f"it has {', '.join(ends)}" if ends else "it has none; name its modules in lora.target_modules"
    return f"target parameter {target!r} matches no parameter of the base model that takes an adapter: {hint}"


def parameter_ends(linear: Mapping[str, LinearModule]) -> list[str]:
    """The last two parts of the names of all parameters, as target_parameters may name them: experts.down_proj."""
    names = (module.parameter for module in linear.values() if module.parameter)
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))


def untrained_note(linear: Mapping[str, LinearModule], adapter: Adapter) -> str | None:
    """What a user should know of places that the adapter leaves out: experts, and modules that PEFT cannot adapt."""
    stacked = {n: m for n, m in linear.items() if bundle_of(n, m.parameter) and n not in adapter.modules}
    if stacked:
        held = sum(placed.rank * sum(placed.shape) for placed in adapter.modules.values())
        more = sum(adapter.lora.r * sum(module.shape) for module in stacked.values())
        ends = ", ".join(f'"{end}"' for end in parameter_ends(stacked))
        return (
            f"{len(stacked)} matrices of experts are not trained ({held:,} values of {held + more:,} that the adapter "
            f"could have): lora.target_parameters = [{ends}] trains them"
        )
    refused = {n: m.refused for n, m in linear.items() if m.refused}
    if refused and adapter.lora.target_modules == "all-linear":
        left = ", ".join(sorted({name.rpartition(".")[2] for name in refused}))
        return f"{left} ({len(refused)} modules) left out of all-linear: {next(iter(refused.values()))}"
    return None


def keep_fitting_patterns(lora: LoraSettings, modules: Collection[str]) -> LoraSettings:
    """[lora] without those patterns that none of the modules matches."""

    def kept(patterns: Mapping[str, Value]) -> dict[str, Value]:
        alone = {key: Patterns([key], "a rank or alpha pattern") for key in patterns}
        return {k: v for k, v in patterns.items() if any(alone[k].key(name) is not None for name in modules)}

    return lora.model_copy(update={"rank_pattern": kept(lora.rank_pattern), "alpha_pattern": kept(lora.alpha_pattern)})


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _values(patterns: Mapping[str, Value], default: Value, names: Mapping[str, str]) -> dict[str, Value]:
    """Name → the value of the first pattern that matches what it is matched by, or the default."""
    table = Patterns(patterns, "a rank or alpha pattern")
    keys = {name: table.key(key) for name, key in names.items()}
    return {name: default if key is None else patterns[key] for name, key in keys.items()}


def _check_found(found: bool, target: str, names: Collection[str]) -> None:
    if found:
        return
    ends = sorted({name.rpartition(".")[2] for name in names})
    near = get_close_matches(target.rpartition(".")[2], ends, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"its linear modules end in {', '.join(ends)}"
    if re.search("embed|wte|wpe", target.rpartition(".")[2]):
        hint = "embeddings take no adapter here; adapt the linear modules around them"
    raise ModelError(f"target module {target!r} matches no linear module of the base model: {hint}")
