"""How a measurement is printed: tables for a terminal, Markdown for the documentation, or JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from fedloom.cli.options import print_result as print_plainly


def print_result(
    result: Mapping[str, Any], tables: Callable[[Mapping[str, Any]], Iterable[Table]], as_json: bool
) -> None:
    """Print a measurement as `--json`, or as the documentation has it with `python -m benchmarks --markdown …`."""
    if as_json or not click.get_current_context().find_root().params.get("markdown"):
        print_plainly(result, tables, as_json)
    else:
        print("\n\n".join(map(to_markdown, tables(result))))


def to_markdown(table: Table) -> str:
    """The table in Markdown; its title is left out, since the page has words of its own."""
    columns = [[_plain(column.header), *map(_plain, column.cells)] for column in table.columns]
    heads, *rows = zip(*columns, strict=True)
    ways = ("---:" if column.justify == "right" else "---" for column in table.columns)
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'|'.join(ways)}|", *(f"| {' | '.join(row)} |" for row in rows)])


def _plain(cell: object) -> str:
    text = cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain
    return " ".join(text.split()).replace("|", "/")
