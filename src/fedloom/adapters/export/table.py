"""What an export wrote, for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from fedloom.adapters.merge.table import MIB, name_range, named_rows
from fedloom.records.text import LONG, cell

Record = Mapping[str, Any]


def relative(rows: Sequence[Record], key: str) -> float:
    """What a step changed, over the change itself: of all modules taken as one vector."""
    part, whole = (math.hypot(*(row[name] for row in rows)) for name in (key, "change"))
    return part / whole if whole else (math.inf if part else 0.0)


def render_export(told: Record) -> RenderableType:
    """The record of `write_export` for a terminal: a row a module, or a kind of modules where there are many."""
    rows = told["modules"]
    shown = [("cut", "error of the cut"), ("rounding", "of rounding")]
    shown = [(key, head) for key, head in shown if any(row[key] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, title=cell(_title(told), "bold"))
    table.add_column("module", overflow="fold", min_width=10)
    for head in ("rank", "now", *(head for _, head in shown), "values"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, group in [*named_rows(rows), (f"all {len(rows)}", rows)]:
        worst = [f"{max(relative([row], key) for row in group):.1e}" for key, _ in shown]
        if group is rows:
            worst = [f"{relative(rows, key):.1e}" for key, _ in shown]
        ranks = [name_range([row[key] for row in group]) for key in ("before", "rank")]
        style = "bold" if group is rows else ""
        table.add_row(cell(name), *ranks, *worst, f"{sum(row['values'] for row in group):,}", style=style)
    said = [f"note: {note}" for note in told["notes"]] + [_closing(told), f"load it: {told['load']}"]
    return Group(table, *(cell(text, limit=LONG) for text in said))


def _title(told: Record) -> str:
    return f"{told['source']} as {told['to']}" + ("" if told["to"] == "merged" else f", {told['dtype']}")


def _closing(told: Record) -> str:
    if not told["written"]:
        return f"nothing written; it would be {told['out']}"
    return f"wrote {told['out']}: {told['bytes'] / MIB:,.2f} MiB"
