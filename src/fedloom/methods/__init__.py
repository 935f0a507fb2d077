"""The one table of methods: name → how to build it, with its presets."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError, validate_call

from fedloom.errors import ConfigError
from fedloom.method import Method
from fedloom.methods.fed_dare import fed_dare
from fedloom.methods.fed_sb import fed_sb
from fedloom.methods.fedex import fedex
from fedloom.methods.fedit import fedit
from fedloom.methods.fedprox import fedprox
from fedloom.methods.fedsrd import fedsrd
from fedloom.methods.fedsvd import fedsvd
from fedloom.methods.ffa import ffa
from fedloom.methods.flasc import flasc
from fedloom.methods.flexlora import flexlora
from fedloom.methods.flora import flora
from fedloom.methods.flora_na import flora_na
from fedloom.methods.florist import florist
from fedloom.methods.hetlora import hetlora
from fedloom.methods.loom import loom
from fedloom.methods.lora_fair import lora_fair
from fedloom.methods.rolora import rolora
from fedloom.methods.server_optimiser import ServerOptimiser, optimised

Settings = Mapping[str, object]
Row = TypeVar("Row")
Built = TypeVar("Built")
SERVER_KEYS = inspect.signature(ServerOptimiser).parameters
"""Settings that any averaging method takes beside its own."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A builder, and named groups of its keyword arguments; without a preset "default" is used, if there is one."""

    builder: Callable[..., Method]
    presets: Mapping[str, Settings] = field(default_factory=dict)


PAPER_SRD: Settings = {"download": "random", "ridge": 0.0}

METHODS: Mapping[str, Entry] = {
    "fedit": Entry(fedit),
    "fedprox": Entry(fedprox),
    "ffa": Entry(ffa),
    "rolora": Entry(rolora),
    "fedsvd": Entry(fedsvd),
    "lora-fair": Entry(lora_fair),
    "flora-na": Entry(flora_na),
    "fedex": Entry(fedex),
    "flora": Entry(flora),
    "flexlora": Entry(flexlora),
    "hetlora": Entry(hetlora),
    "florist": Entry(florist, {"paper": {"tau": 0.9, "client_init": "merge_reinit"}}),
    "fed-dare": Entry(fed_dare),
    "flasc": Entry(flasc),
    "fed-sb": Entry(fed_sb),
    "fedsrd": Entry(fedsrd, {"paper": PAPER_SRD}),
    "fedsrd-e": Entry(partial(fedsrd, decompose=False), {"paper": PAPER_SRD}),
    "loom": Entry(loom),
}


def build(name: str, settings: Settings | None = None) -> Method:
    """The method called `name`, with a preset ("preset" among the settings) and single settings over it.

    Raises ConfigError that names the unknown method, preset or key, the nearest one there is, or the wrong value.
    """
    entry = _known("method.name", name, METHODS)
    given = dict(settings or {})
    preset = given.pop("preset", "default")
    chosen = _known("method.preset", str(preset), {"default": {}, **entry.presets})
    own = {**chosen, **given}
    server = {key: own.pop(key) for key in SERVER_KEYS if key in own and key not in options(name)}
    for key in own:
        _known(f"method.{name} key", key, {**options(name), **SERVER_KEYS})
    built: Method = _checked(lambda: validate_call(entry.builder)(**own))
    if not server:
        return built
    return optimised(built, _checked(lambda: TypeAdapter(ServerOptimiser).validate_python(server)))


def _checked(make: Callable[[], Built]) -> Built:
    """What `make` returns. Raises ConfigError naming the first setting that has a wrong type or value."""
    try:
        return make()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"method.{where} is {first['input']!r}: {first['msg'].lower()}") from None


def options(name: str) -> dict[str, object]:
    """The settings of a method and their defaults, read from its builder's signature."""
    entry = _known("method.name", name, METHODS)
    bound = entry.builder.keywords if isinstance(entry.builder, partial) else {}
    parameters = inspect.signature(entry.builder).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key not in bound}
    return {**defaults, **entry.presets.get("default", {})}


def _known(what: str, key: str, table: Mapping[str, Row]) -> Row:
    if key in table:
        return table[key]
    near = difflib.get_close_matches(key, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ConfigError(f"{what} {key!r} is unknown{hint} Known: {', '.join(sorted(table))}")
