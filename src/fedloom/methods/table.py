"""The one table of methods: name → how to build it, with its presets."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from pydantic import PydanticUserError, TypeAdapter, ValidationError, validate_call

from fedloom.errors import ConfigError, begin_small
from fedloom.methods.decomfl import decomfl
from fedloom.methods.fed_dare import fed_dare
from fedloom.methods.fed_sb import fed_sb
from fedloom.methods.fedex import fedex
from fedloom.methods.fedit import fedit
from fedloom.methods.fedkseed import fedkseed
from fedloom.methods.fedprox import fedprox
from fedloom.methods.fedsrd import fedsrd
from fedloom.methods.fedsvd import fedsvd
from fedloom.methods.ferret import ferret
from fedloom.methods.ffa import ffa
from fedloom.methods.flasc import flasc
from fedloom.methods.flexlora import flexlora
from fedloom.methods.flora import flora
from fedloom.methods.flora_na import flora_na
from fedloom.methods.florist import florist
from fedloom.methods.foreign import is_foreign, load_builder
from fedloom.methods.hetlora import hetlora
from fedloom.methods.hiso import hiso
from fedloom.methods.loom import loom
from fedloom.methods.lora_fair import lora_fair
from fedloom.methods.lora_xs import lora_xs
from fedloom.methods.method import Method
from fedloom.methods.rolora import rolora
from fedloom.methods.shared.server_optimiser import ServerOptimiser, broadcasts_mean, optimise_mean
from fedloom.methods.sparseloco import sparseloco

Settings = Mapping[str, object]
Found = TypeVar("Found")
Built = TypeVar("Built")
SERVER_KEYS = inspect.signature(ServerOptimiser).parameters
"""Settings that any averaging method takes beside its own."""
SERVER_OPTIMISERS = ("fedavgm", "fedadam")
"""The choices of method.server_optimizer."""
ALIASES: Mapping[str, tuple[str, str]] = {"fedavg": ("fedit", "FedAvg of the two LoRA factors")}
"""Another name of a method → its name here, and what it is."""
MOVED = {
    "budget": 'use wire.budget, for any method that chooses how much it sends. A share ("1%") means what it meant; '
    "bytes are those of one payload now, the mean of both ways: half of what method.budget was"
}
"""Keys that were settings of a method once, and what to use in their place."""


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """A builder, and named groups of its keyword arguments.

    Names with a meaning: "default" is used where none is named, "paper" has the published settings, "lossless" leaves
    nothing out, "offline" is what `fedloom aggregate` uses.
    """

    builder: Callable[..., Method]
    presets: Mapping[str, Settings] = field(default_factory=dict)


PAPER_SRD: Settings = {"download": "random", "ridge": 0.0, "rescale_step": math.inf, "step_guard": False}
LOSSLESS_SRD: Settings = {**PAPER_SRD, "base_sparsity": 0.0, "sparsity_upper": 0.0, "download_sparsity": 0.0}

METHODS: Mapping[str, MethodEntry] = {
    "fedit": MethodEntry(fedit),
    "fedprox": MethodEntry(fedprox),
    "ffa": MethodEntry(ffa),
    "rolora": MethodEntry(rolora),
    "fedsvd": MethodEntry(fedsvd),
    "lora-fair": MethodEntry(lora_fair),
    "flora-na": MethodEntry(flora_na),
    "fedex": MethodEntry(fedex),
    "flora": MethodEntry(flora),
    "flexlora": MethodEntry(flexlora),
    "hetlora": MethodEntry(hetlora),
    "florist": MethodEntry(
        florist,
        {
            "paper": {"tau": 0.9, "client_init": "merge_reinit", "step_guard": False},
            "lossless": {"tau": 1.0, "step_guard": False},
            # Nobody trains on from a part of what is merged offline, so it is merged as a whole.
            "offline": {"client_init": "merge_reinit", "step_guard": False},
        },
    ),
    "fed-dare": MethodEntry(fed_dare, {"lossless": {"sparsity": 0.0}}),
    "flasc": MethodEntry(flasc),
    "fed-sb": MethodEntry(fed_sb, {"lossless": {"keep": "all"}}),
    "fedsrd": MethodEntry(fedsrd, {"paper": PAPER_SRD, "lossless": LOSSLESS_SRD}),
    "fedsrd-e": MethodEntry(partial(fedsrd, decompose=False), {"paper": PAPER_SRD, "lossless": LOSSLESS_SRD}),
    "lora-xs": MethodEntry(lora_xs, {"paper": {"coded": False}, "lossless": {"coded": False}}),
    "sparseloco": MethodEntry(sparseloco, {"lossless": {"chunk_size": 1, "topk": 1, "two_bits": False}}),
    "ferret": MethodEntry(ferret, {"lossless": {"share": 1.0, "server_learning_rate": 1.0}}),
    "fedkseed": MethodEntry(fedkseed),
    "decomfl": MethodEntry(decomfl),
    "hiso": MethodEntry(hiso),
    "loom": MethodEntry(loom),
}


def build(method: str | Method, settings: Settings | None = None) -> Method:
    """A method by its name in METHODS or as "package.module:builder", or a `Method` as it is.

    settings: a preset ("preset") and single settings over it; a `Method` has its own already and takes none. A method
    of another package is called by its whole name, so that nobody takes it for one of fedloom's.
    Raises ConfigError that names the unknown method, preset or key, the nearest one there is, or the wrong value.
    """
    if isinstance(method, Method):
        if settings:
            raise ConfigError(f"method {method.name!r} is built already: give {', '.join(settings)} to its builder")
        return method
    if method_name(method) != method:
        return _build_alias(method, settings)
    entry = method_entry(method)
    given = dict(settings or {})
    preset = given.pop("preset", "default")
    chosen = _known("method.preset", str(preset), {"default": {}, **entry.presets})
    own = {**chosen, **given}
    server = {key: own.pop(key) for key in SERVER_KEYS if key in own and key not in method_options(method)}
    for key in own:
        if key in MOVED and key not in method_options(method):
            raise ConfigError(f"method.{key} is not a setting: {MOVED[key]}")
        _known(f"method.{method} key", key, {**method_options(method), **SERVER_KEYS})
    built: object = _checked(method, lambda: validate_call(entry.builder)(**own))
    if not isinstance(built, Method):
        raise ConfigError(f"method.name is {method!r}, but its builder returns {type(built).__name__}, not a Method")
    built = replace(built, name=method) if is_foreign(method) else built
    if not server:
        return built
    return optimise_mean(built, _checked(method, lambda: TypeAdapter(ServerOptimiser).validate_python(server)))


def method_name(text: str) -> str:
    """The name in METHODS that a text means: in any case, with _ for -, or one of ALIASES. Other texts stay as is."""
    plain = text.strip().lower().replace("_", "-")
    name = ALIASES[plain][0] if plain in ALIASES else plain
    return name if name in METHODS else text


def _build_alias(text: str, settings: Settings | None) -> Method:
    """The method that another name or spelling stands for. Where the name is another one, the run says so."""
    built = build(method_name(text), settings)
    plain = text.strip().lower()
    if plain not in ALIASES:
        return built
    note = f"method {plain!r} is {built.name!r} here: {ALIASES[plain][1]}"
    return replace(built, advise=lambda adapter, context: note)


def method_entry(name: str) -> MethodEntry:
    """The row of METHODS, or a new one for a builder of another package. Raises ConfigError for an unknown name."""
    if is_foreign(name):
        return MethodEntry(load_builder(name))
    if name.lower() in SERVER_OPTIMISERS:
        raise ConfigError(
            f"method.name {name!r} is unknown: it is a server optimiser, which works over a method. Use "
            f'method.name = "fedit" and method.server_optimizer = "{name.lower()}"'
        )
    return _known("method.name", method_name(name), METHODS)


def offline_methods() -> list[str]:
    """Names of the methods whose server step needs the updates alone, so that adapter folders can be merged by it."""
    return [name for name in METHODS if build(name).facts.stateless]


def buffered_names() -> list[str]:
    """Names of the methods whose updates still mean something when the server has gone on: for asynchronous rounds."""
    return [name for name in METHODS if build(name).updates]


def _checked(method: str, make: Callable[[], Built]) -> Built:
    """What `make` returns. Raises ConfigError naming the first setting that is missing or has a wrong type or value."""
    try:
        return make()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"].startswith("missing"):
            raise ConfigError(f"method.{where} is missing: {method} has no default for it") from None
        raise ConfigError(f"method.{where} is {first['input']!r}: {begin_small(first['msg'])}") from None
    except PydanticUserError as error:
        text = str(error).partition("\n")[0]
        raise ConfigError(f"the settings of method {method} cannot be read from its builder: {text}") from error


def method_options(name: str) -> dict[str, object]:
    """The settings of a method and their defaults, read from its builder's signature."""
    entry = method_entry(name)
    bound = entry.builder.keywords if isinstance(entry.builder, partial) else {}
    parameters = inspect.signature(entry.builder).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key not in bound}
    return {**defaults, **entry.presets.get("default", {})}


def server_options(name: str) -> dict[str, object]:
    """The settings of a server optimiser and their defaults, where the method takes one; else nothing."""
    if "server_tau" in method_options(name) or not broadcasts_mean(build(name)):
        return {}
    return {key: None if found.default is found.empty else found.default for key, found in SERVER_KEYS.items()}


def _known(what: str, key: str, table: Mapping[str, Found]) -> Found:
    if key in table:
        return table[key]
    near = difflib.get_close_matches(key.lower(), table, n=3)
    # Two letters that have changed places are the likeliest slip; to difflib another letter is as near.
    near.sort(key=lambda name: sorted(name) != sorted(key.lower()))
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ConfigError(f"{what} {key!r} is unknown{hint} Known: {', '.join(sorted(table))}")
