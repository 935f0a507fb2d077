"""Settings in and out of TOML: a file with `--set a.b=v` over it → `Config`, and back.

A wrong setting is a `ConfigError` that names the file, the key, what was found and what was expected; an unknown
key also names the nearest valid one.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedloom.errors import ConfigError, UnknownKeyError, begin_small
from fedloom.records.config import ClientSettings, Config

Tree = dict[str, Any]

_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length}",
    "too_long": "at most {max_length}",
    "string_too_long": "at most {max_length} characters",
}
"""pydantic's kind of error → what was expected, in words."""

_NAMED = (("rank_pattern",), ("alpha_pattern",), ("sources",))
"""Keys whose tables have names of the user's own: a message names the entry that is wrong."""
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list"}
MOST_SHOWN = 200
"""Characters of a wrong value that a message repeats."""
_LOCATED = (
    ("model", "path"),
    ("model", "adapter"),
    ("data", "source"),
    ("data", "sources"),
    ("data", "heldout"),
    ("data", "validation"),
    ("federation", "public"),
    ("evaluation", "include_path"),
    ("output", "dir"),
    ("flower", "root_certificates"),
)
"""Settings that may be paths: "./x" counts from the folder of the file that says it, "~" is the user's home."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a TOML file with overrides such as "training.max_steps=20" over them.

    Paths that begin with ./ or ../ are made absolute: from the file's folder, or for overrides from the working folder;
    those that begin with ~ are in the user's home.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `fedloom init {path}` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    _refuse_unknown(tree, str(path))
    resolve_paths(tree, path.parent)
    for text in overrides:
        above = override(text)
        _refuse_unknown(above, "--set")
        merge_trees(tree, resolve_paths(above, Path.cwd()))
    return parse(tree, f"{path} with --set" if overrides else str(path))


def parse(tree: Mapping[str, Any], origin: str) -> Config:
    """The settings of a tree of tables. Raises ConfigError about the first key that is wrong; `origin` is the file."""
    _refuse_unknown(tree, origin)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{explain(error)} ({origin})") from None


def override(text: str) -> Tree:
    """The tree that "a.b=v" means. v is typed as in TOML, or a string where TOML cannot read it; null unsets a key."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: expected key=value, such as training.max_steps=20")
    for literal in (value, json.dumps(value.strip())):
        try:
            return tomllib.loads(f"{key.strip()} = {literal}")
        except tomllib.TOMLDecodeError as error:
            failure = error
    raise ConfigError(
        f"--set {text}: {key.strip()!r} is not a key ({failure}); expected one such as training.max_steps"
    )


def merge_trees(tree: Tree, above: Mapping[str, Any]) -> None:
    """Put the keys of `above` into `tree`, table by table; null takes a key out, and {} all keys of a table."""
    for key, value in above.items():
        below = tree.get(key)
        if isinstance(value, Mapping) and value and isinstance(below, dict):
            merge_trees(below, value)
        elif value == "null":
            tree.pop(key, None)
        else:
            tree[key] = value


def resolve_paths(tree: Tree, folder: Path) -> Tree:
    """The tree with explicitly relative paths (./ and ../) made absolute from `folder`, and ~ expanded; in place."""
    for section, key in _LOCATED:
        table = tree.get(section)
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(table, dict) and value is not None:
            table[key] = _located(value, folder)
    return tree


def _located(value: object, folder: Path) -> object:
    """A path made absolute; a table or list, as data.sources is, with all that it names as a source."""
    if isinstance(value, str) and value.startswith(("./", "../", "~")):
        return os.path.normpath(folder.absolute() / os.path.expanduser(value))
    if isinstance(value, list):
        return [_located(one, folder) for one in value]
    if isinstance(value, dict):
        # A source's own table: its subset and its columns are no paths.
        keys = {"source"} if isinstance(value.get("source"), str) and value.keys() & {"subset", "columns"} else value
        return {key: _located(held, folder) if key in keys else held for key, held in value.items()}
    return value


def dump(config: Config) -> str:
    """TOML that `parse` turns into an equal `Config`. Settings that are not set are left out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def dump_file(config: Config) -> str:
    """TOML that `load_config` turns into an equal `Config`, in whatever folder the file lies.

    A relative path is one that nobody set, so it is left out: in a file it would be read from that file's folder.
    """
    tree, sections = config.model_dump(exclude_none=True), _sections()
    for section, key in _LOCATED:
        default = sections[section].model_fields[key].default
        if isinstance(default, str) and tree[section].get(key) == default:
            del tree[section][key]
    return tomli_w.dumps(tree)


def settings_template(chosen: Mapping[str, object] | None = None) -> str:
    """A commented file with every key and its default, for `fedloom init`.

    chosen: "section.key" → what it is to be instead of its default; None takes the key out.
    """
    chosen = chosen or {}
    parts = ["# Settings of a fedloom run: every key with its default. Delete what you do not change."]
    for name, section in _sections().items():
        parts.append(f"\n[{name}]")
        for key, field in section.model_fields.items():
            parts += ["# " + line for line in textwrap.wrap(field.description or "", 100)]
            line = _line(key, field)
            if f"{name}.{key}" in chosen:
                value = chosen[f"{name}.{key}"]
                line = f"# {line}" if value is None else f"{key} = {_toml(value)}"
            parts.append(line)
    parts.append(
        "\n# What one client has otherwise than [lora] and [training] say:\n# [clients.NAME]\n# r = 8\n"
        "# lora_alpha = 16.0\n# learning_rate = 0.0001\n"
    )
    return "\n".join(parts)


def setting_keys() -> list[str]:
    """Every fixed key, as "section.key"."""
    return [f"{name}.{key}" for name, section in _sections().items() for key in section.model_fields]


def _sections() -> dict[str, type[BaseModel]]:
    fields = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: kind for name, kind in fields.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _line(key: str, field: FieldInfo) -> str:
    unset = field.default is None
    value = (field.examples or [""])[0] if unset else field.default
    return f"{'# ' if unset else ''}{key} = {_toml(value)}"


def _toml(value: object) -> str:
    """A value as TOML has it, in one line."""
    if not isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    inside = ", ".join(f"{_key_text(key)} = {json.dumps(held, ensure_ascii=False)}" for key, held in value.items())
    return f"{{ {inside} }}" if inside else "{}"


def _key_text(key: str) -> str:
    """A key as TOML has it: bare where it may be."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


UNSUPPORTED: Mapping[str, str] = {
    "use_dora": "DoRA's change of a weight is no product B A, which the methods average; use lora.use_rslora, or a "
    "higher lora.r",
    "modules_to_save": "whole modules are not sent, adapters alone are; add such modules to lora.target_modules",
    "trainable_token_indices": "embeddings are not trained; use a base model that has the tokens",
    "bias": "biases are not trained, since they are no product B A; leave it out",
    "exclude_modules": "name what is adapted instead: lora.target_modules takes a list, or a regular expression",
    "layers_to_transform": 'lora.target_modules takes a regular expression: ".*layers.(0|1).*q_proj"',
    "init_lora_weights": "every adapter starts with B = 0, so that the base model is where all clients begin",
    "task_type": "it is CAUSAL_LM always; leave it out",
}
"""Keys of peft.LoraConfig that are no settings here → what to do instead."""


def _refuse_unknown(tree: Mapping[str, Any], origin: str) -> None:
    for key in _unknown(tree):
        table, _, last = key.rpartition(".")
        if last in UNSUPPORTED and (table == "lora" or table.startswith("clients.")):
            raise ConfigError(f"{key} in {origin} is not supported: {UNSUPPORTED[last]}")
        near = _nearest(key)
        section = _sections().get(key.partition(".")[0])
        others = f"; [{key.partition('.')[0]}] has {', '.join(section.model_fields)}" if section else ""
        hint = f"; did you mean {near!r}?" if near else others
        raise UnknownKeyError(f"unknown key {key!r} in {origin}{hint}", key)


def _unknown(tree: Mapping[str, Any]) -> Iterator[str]:
    sections = _sections()
    for name, table in tree.items():
        if name == "clients":
            for client, own in table.items() if isinstance(table, Mapping) else ():
                if isinstance(own, Mapping):
                    yield from (f"clients.{client}.{key}" for key in own if key not in ClientSettings.model_fields)
        elif name not in sections:
            yield name
        elif isinstance(table, Mapping) and sections[name].model_config.get("extra") == "forbid":
            yield from (f"{name}.{key}" for key in table if key not in sections[name].model_fields)


def _nearest(key: str) -> str | None:
    """The valid key that was probably meant: one with the same or a similar last word, the same section first.

    At the top, where tables are named, it is a table before it is a key.
    """
    prefix, _, last = key.rpartition(".")
    if prefix.startswith("clients."):
        words = {name: f"{prefix}.{name}" for name in ClientSettings.model_fields}
    else:
        ordered = sorted(setting_keys(), key=lambda valid: valid.startswith(f"{prefix}."))
        words = {valid.rpartition(".")[2]: valid for valid in ordered}
    if not prefix and (table := difflib.get_close_matches(last, _sections(), n=1, cutoff=0.7)):
        return table[0]
    near = difflib.get_close_matches(last, words, n=1, cutoff=0.7)  # a slip of a letter or two, not another word
    return words[near[0]] if near else None


def explain(error: ValidationError) -> str:
    """One sentence about the first wrong key; where several types are allowed, "or" joins what each expects."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "value_error" and not first["loc"]:
        return str(first["ctx"]["error"])
    key = _key(first["loc"])
    same = [e for e in errors if _key(e["loc"]) == key]
    expected = " or ".join(dict.fromkeys(_expected(e) for e in same))
    value = first["input"]
    kind = _KINDS.get(type(value), "a table" if isinstance(value, Mapping) else type(value).__name__)
    named = f", {kind}" if any(e["type"].endswith("_type") for e in same) else ""
    shown = json.dumps(value, default=str, ensure_ascii=False)
    return f"{_short(key)} is {_short(shown)}{named}; expected {expected}"


def _short(text: str) -> str:
    """The text, or its beginning where a list or a name is long."""
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"


def _key(loc: tuple[int | str, ...]) -> str:
    """The dotted key, without the parts by which pydantic names a member of a union or a place in a list."""
    depth = 3 if loc and loc[0] in ("clients",) or loc[1:2] in _NAMED else 2
    return ".".join(str(part) for part in loc[:depth])


def _expected(error: Mapping[str, Any]) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).rpartition("expected ")[2]
    words = _EXPECTED.get(error["type"])
    return words.format(**error.get("ctx", {})) if words else begin_small(str(error["msg"]))
