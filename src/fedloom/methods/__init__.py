"""The one table of methods: name → how to build it, with its presets."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from pydantic import ValidationError, validate_call

from fedloom.errors import ConfigError
from fedloom.method import Method
from fedloom.methods.fedit import fedit
from fedloom.methods.fedsrd import fedsrd
from fedloom.methods.florist import florist

Settings = Mapping[str, object]
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Entry:
    """A builder, and named groups of its keyword arguments; without a preset "default" is used, if there is one."""

    builder: Callable[..., Method]
    presets: Mapping[str, Settings] = field(default_factory=dict)


METHODS: Mapping[str, Entry] = {
    "fedit": Entry(fedit),
    "fedsrd": Entry(fedsrd, {"paper": {}}),
    "fedsrd-e": Entry(partial(fedsrd, decompose=False), {"paper": {}}),
    "florist": Entry(florist, {"paper": {}}),
}


def build(name: str, settings: Settings | None = None) -> Method:
    """The method called `name`, with a preset ("preset" among the settings) and single settings over it.

    Raises ConfigError that names the unknown method, preset or key, the nearest one there is, or the wrong value.
    """
    entry = _known("method.name", name, METHODS)
    given = dict(settings or {})
    preset = given.pop("preset", "default")
    chosen = _known("method.preset", str(preset), {"default": {}, **entry.presets})
    for key in given:
        _known(f"method.{name} key", key, options(name))
    try:
        built: Method = validate_call(entry.builder)(**{**chosen, **given})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"method.{where} is {first['input']!r}: {first['msg'].lower()}") from None
    return built


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
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{what} {key!r} is unknown{hint} Known: {', '.join(sorted(table))}")
