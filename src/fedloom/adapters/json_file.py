"""JSON files of strangers, read within bounds: size, nesting, and no values that JSON does not have."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from fedloom.errors import ModelError

LARGEST = 16 * 2**20
"""Bytes. The largest such files, indexes of weights with a line a tensor, have a few MiB."""
DEEPEST = 32
"""Levels of nesting; the deepest configurations in use have fewer than ten."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises ModelError for a file that cannot be read, is larger than LARGEST or nested deeper than DEEPEST, is not valid
    JSON, holds a number that is not finite or text that is not Unicode, or holds something else than an object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ModelError(
                f"{path} is larger than {LARGEST:,} bytes: it is not a configuration of a model or adapter"
            )
        held = json.loads(content.decode("utf-8"), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not valid JSON ({ascii(str(error))[1:-1][:200]})") from None
    except RecursionError:
        raise ModelError(f"{path} is nested too deeply: expected at most {DEEPEST} levels") from None
    if not isinstance(held, dict):
        raise ModelError(f"{path} holds a {type(held).__name__}, expected an object with settings")
    for value, depth in walk_json(held):
        if depth > DEEPEST:
            raise ModelError(f"{path} is nested too deeply: expected at most {DEEPEST} levels")
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{path} holds a number that is too large: expected finite numbers")
        if isinstance(value, str) and not _is_text(value):
            raise ModelError(f"{path} holds half of a character, {ascii(value)[:80]}: expected Unicode text")
    return held


def walk_json(held: object) -> Iterator[tuple[object, int]]:
    """Everything inside, keys too, with its depth; without recursion."""
    pending = [(held, 1)]
    while pending:
        value, depth = pending.pop()
        yield value, depth
        if depth > DEEPEST:
            continue
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if isinstance(inner, list):
            pending += [(part, depth + 1) for part in inner]


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8, which surrogates alone cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
