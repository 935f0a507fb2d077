"""Options and small parsers that several commands share, and how a result is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedloom.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at the same time.")]
Workers = Annotated[int | None, typer.Option(min=1, help="local: processes that train a round's clients side by side.")]
Devices = Annotated[str, typer.Option(help="local: where they train: cpu, or GPUs such as cuda:0,cuda:1.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]


def override_local(workers: int | None, devices: str) -> list[str]:
    """What --workers and --devices say, as `--set` does."""
    count = [] if workers is None else [f"local.workers={workers}"]
    return count + ([f"local.devices={json.dumps(split_words(devices))}"] if devices else [])


def split_words(text: str) -> list[str]:
    """The words of a list such as "a,b"."""
    return [word.strip() for word in text.split(",") if word.strip()]


def split_numbers(text: str, option: str) -> list[int]:
    """The whole numbers of a list such as "64,32"."""
    if not all(word.isdecimal() for word in split_words(text)):
        raise ConfigError(f"{option} {text}: expected whole numbers with commas between them, such as 64,32,16")
    return [int(word) for word in split_words(text)]


def print_result(
    result: Mapping[str, object], tables: Callable[[Mapping[str, object]], Iterable[Table]], as_json: bool
) -> None:
    """Print a measurement as JSON or as tables."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        Console().print(*tables(result), sep="\n")


def say(text: str) -> None:
    """Print a sentence as it is."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
