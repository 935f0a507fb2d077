"""What a merge did, as plain JSON values and as tables for people."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from fedloom.adapters.folder import other_base_note
from fedloom.records.text import LONG, cell

if TYPE_CHECKING:
    from fedloom.adapters.merge.combine import Recipe
    from fedloom.adapters.merge.folders import Inputs, MergedModule

Record = Mapping[str, Any]
Show = Callable[[Sequence[Record]], str]
LONGEST = 16
"""Rows of a table at most; beyond, modules are folded by the last part of their names."""
MIB = 2**20


def build_record(
    inputs: Inputs, recipe: Recipe, rows: Sequence[MergedModule], base: Path | None = None
) -> dict[str, Any]:
    """{"method", "adapters", "modules", "whole", "total", "notes"}: errors are relative to ‖Σ p_k ΔW_k‖_F.

    base: the base model's folder where the adapters are merged into one. "whole": name → number of values of each whole
    tensor.
    """
    modules = [
        {
            "module": row.module,
            "adapters": len(row.ranks),
            "ranks": list(row.ranks),
            "rank": row.rank,
            **_figures([row], recipe),
        }
        for row in rows
    ]
    adapters = zip(inputs.adapters, inputs.shares, strict=True)
    whole = {name: math.prod(inputs.adapters[0].whole[name]) for name in inputs.whole}
    total = _figures(rows, recipe)
    values = total["values"] + sum(whole.values())
    return {
        "method": recipe.method,
        "adapters": [{"folder": str(a.folder), "share": share, "modules": len(a.modules)} for a, share in adapters],
        "modules": modules,
        "whole": whole,
        "total": {**total, "values": values, "bytes": values * recipe.dtype.itemsize},
        "notes": note_inputs(inputs, base),
    }


def _figures(rows: Sequence[MergedModule], recipe: Recipe) -> dict[str, float | int]:
    """Of one module, or of several taken as one vector. kept_energy: 1 − error², what Σσ² the result explains."""
    exact = _norm(row.costs.exact for row in rows)
    error = _share(_norm(row.costs.error for row in rows), exact)
    values = sum(row.values for row in rows)
    return {
        "kept_energy": max(0.0, 1.0 - error * error),
        "error": error,
        "cap_error": _share(_norm(row.costs.cap for row in rows), exact),
        "rounding_error": _share(_norm(row.costs.rounding for row in rows), exact),
        "values": values,
        "bytes": values * recipe.dtype.itemsize,
    }


def _norm(sizes: Iterable[float]) -> float:
    return math.hypot(*sizes)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else (float("inf") if part else 0.0)


def note_inputs(inputs: Inputs, base: Path | None) -> list[str]:
    """What a user should know before trusting the result. base: what they are merged into, if anything."""
    count = len(inputs.adapters)
    partial = [module for module in inputs.layouts if len(inputs.holders(module)) < count]
    notes = []
    if partial:
        notes.append(
            f"{len(partial)} of {len(inputs.layouts)} modules are not in all adapters ({partial[0]}, say); there an "
            "adapter without the module counts as no change"
        )
    if inputs.whole:
        notes.append(f"{len(inputs.whole)} whole tensors were averaged as they are: {', '.join(inputs.whole[:3])}")
    digests = {adapter.base_digest for adapter in inputs.adapters}
    if len(inputs.base_models) > 1 and (len(digests) > 1 or "" in digests):  # equal weights may lie at several places
        notes.append(f"the adapters name different base models: {', '.join(inputs.base_models)}")
    other = other_base_note(inputs.adapters, base) if base else None
    return [*notes, other] if other else notes


def render_record(told: Record) -> RenderableType:
    """The record for a terminal: a row a module, or a kind of modules where there are many; totals; notes."""
    rows, count = told["modules"], len(told["adapters"])
    table = Table(box=box.SIMPLE_HEAD, title=cell(f"{told['method']} over {count} adapter{'s' * (count > 1)}", "bold"))
    table.add_column("module", overflow="fold", min_width=10)
    columns = [(head, show) for head, show, said in _COLUMNS if said(told)]
    for head, _ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for name, group in named_rows(rows):
        table.add_row(cell(name), *(show(group) for _, show in columns))
    total: Record = {**told["total"], "adapters": count, "ranks": [], "rank": 0}
    table.add_row(f"all {len(rows)}", *(show([total]) for _, show in columns), style="bold")
    return Group(
        table, *(cell(f"note: {note}", limit=LONG) for note in told["notes"]), cell(_closing(told), limit=LONG)
    )


def _closing(told: Record) -> str:
    """What `fedloom aggregate` wrote, or would: told["out"], told["base"], told["written"], told["model"]."""
    what = f"adapter of rank {max(row['rank'] for row in told['modules'])}, {told['total']['bytes'] / MIB:,.1f} MiB"
    if told["base"]:
        what = f"{told['base']} with {len(told['modules'])} modules changed"
    if told["model"]:
        what += f", {told['model']['bytes'] / MIB:,.1f} MiB; rounding is {told['model']['rounding']:.1e} of the change"
        what += f"; not copied: {', '.join(told['model']['left_out'])}" if told["model"]["left_out"] else ""
    return f"{'wrote' if told['written'] else 'nothing written; it would be'} {told['out']}: {what}"


def named_rows(rows: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Every module less what all names begin with; beyond LONGEST of them, those with one last part together."""
    names = [row["module"] for row in rows]
    if len(rows) <= LONGEST:
        start = len(os.path.commonprefix(names).rpartition(".")[0])
        return [(name[start:].lstrip("."), [row]) for name, row in zip(names, rows, strict=True)]
    kinds: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        # One expert of many has its place for a last part: experts.down_proj.3.
        kinds[re.sub(r"\.\d+$", "", row["module"]).rpartition(".")[2]].append(row)
    return [(f"{kind} × {len(group)}", group) for kind, group in sorted(kinds.items())]


def name_range(numbers: Sequence[int]) -> str:
    """The lowest and the highest of some numbers; empty for none."""
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"


def _worst(key: str) -> Show:
    return lambda group: f"{max(row[key] for row in group):.1e}"


def _partial(told: Record) -> bool:
    return any(row["adapters"] < len(told["adapters"]) for row in told["modules"])


def _always(told: Record) -> bool:
    return True


_COLUMNS: tuple[tuple[str, Show, Callable[[Record], bool]], ...] = (
    ("adapters", lambda group: name_range([row["adapters"] for row in group]), _partial),
    ("ranks", lambda group: name_range([rank for row in group for rank in row["ranks"]]), _always),
    ("rank", lambda group: name_range([row["rank"] for row in group if row["rank"]]), _always),
    ("kept", lambda group: f"{100 * min(row['kept_energy'] for row in group):.2f} %", _always),
    ("error", _worst("error"), _always),
    ("cap", _worst("cap_error"), lambda told: told["total"]["cap_error"] > 0),
    ("rounding", _worst("rounding_error"), lambda told: told["total"]["rounding_error"] > 0),
    ("MiB", lambda group: f"{sum(row['bytes'] for row in group) / MIB:.2f}", _always),
)
"""Head; cell of one module, or of several (range of numbers, worst of errors, sum of sizes); whether it is shown."""
