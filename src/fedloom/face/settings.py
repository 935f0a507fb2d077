"""Settings from Python: a file or the testbed, with changes named as on the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedloom.errors import ConfigError
from fedloom.methods.method import Method
from fedloom.records import configfile
from fedloom.records.config import Config
from fedloom.studies.compare import apply_overrides, variant_overrides, with_method
from fedloom.testbeds import testbed_folder

Settings = Mapping[str, object]
"""Dotted key → value, such as {"training.learning_rate": 3e-3}; None unsets a key."""


def load(path: str | Path, settings: Settings | None = None) -> Config:
    """The settings of a TOML file with `settings` over them. Raises ConfigError that names the wrong key."""
    return configfile.load_config(Path(path), as_overrides(settings))


def testbed(name: str = "demo", settings: Settings | None = None) -> Config:
    """A federation that comes with fedloom: model, data and settings, ready to run.

    "demo" has four sites with one skill each; "many" has more clients of unequal rank. Raises ConfigError for another
    name.
    """
    folder = testbed_folder()
    if not (folder / f"{name}.toml").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
        raise ConfigError(f"there is no testbed {name!r}: expected one of {known}")
    return load(folder / f"{name}.toml", settings)


def apply_changes(config: Config | str | Path, settings: Settings | None, method: str | Method | None) -> Config:
    """The settings with changes over them; another method drops the settings of the one before."""
    known = load(config) if isinstance(config, str | Path) else config
    given = as_overrides(settings)
    if isinstance(method, Method):
        own = [key for key in settings or {} if key.partition(".")[0] == "method"]
        if own:
            raise ConfigError(f"method {method.name!r} is built already: give {', '.join(own)} to its builder")
        return with_method(apply_overrides(known, given), method)
    return apply_overrides(known, [*variant_overrides(method), *given] if method else given)


def as_overrides(settings: Settings | None) -> list[str]:
    """Settings as `--set` writes them."""
    return [f"{key}={_toml(value)}" for key, value in (settings or {}).items()]


def _toml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_toml(inner) for inner in value) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
