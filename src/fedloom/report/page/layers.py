"""What the server sent of every layer and module, as maps; and what the method says of itself in numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedloom.records.ledger import Aggregation, Layers, Row
from fedloom.records.text import to_printable
from fedloom.report.page.charts import Axis, Chart, Number, Series, number
from fedloom.report.page.model import Block, Section, Table
from fedloom.report.sampling import MOST, sample

MOST_LAYERS, MOST_KINDS = 96, 24
"""Rows and columns of a map."""
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class _Map:
    key: str
    title: str
    scale: Axis
    note: str
    read: Callable[[Layers], Sequence[float]]


_MAPS = (
    _Map("rank", "Rank", Axis("rank", low=0, whole=True), "Rank of what the server sent.", lambda row: row.ranks),
    _Map(
        "density",
        "Density",
        Axis("values sent", "%", low=0),
        "Share of the values that were sent; the others were left as they are.",
        lambda row: [100 * value for value in row.densities],
    ),
    _Map("norm", "Size of the step", Axis("norm", low=0), "√Σ v² of the values that were sent.", lambda row: row.norms),
    _Map(
        "energy",
        "Kept energy",
        Axis("energy kept", "%", high=100),
        "Share of the energy ‖ΔW‖² of the clients' sum that the method kept.",
        lambda row: [100 * value for value in row.kept],
    ),
)


def describe_layers(rows: Sequence[Row]) -> Section | None:
    """Maps of the last round that was told of, and what became of them over the rounds."""
    told, own = [row for row in rows if isinstance(row, Layers)], _numbers(rows)
    if not told:
        return Section("layers", "The method", own) if own else None
    last, charts = told[-1], list[Block]()
    for one in _MAPS:
        values = one.read(last)
        if values:
            charts.append(_draw_map(one, last, values))
    charts += [chart for one in _MAPS for chart in _course(one, told)]
    lead = f"What the server sent after round {last.round}, by layer and module."
    return Section("layers", "Layers", [*charts, *own], lead)


def _numbers(rows: Sequence[Row]) -> list[Block]:
    """The method's own numbers: at first, at last, and their ends."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if isinstance(row, Aggregation):
            for name, value in row.stats.items():
                if math.isfinite(value):
                    found.setdefault(name, []).append(value)
    lines = [
        (name, *(f"{value:.4g}" for value in (held[0], held[-1], min(held), max(held))))
        for name, held in list(found.items())[:MOST]
    ]
    head = ("number", "first", "last", "least", "most")
    return [Table("numbers", "What the method says of itself", head, lines)] if lines else []


def place_module(module: str) -> tuple[str, str]:
    """(layer, kind) of a module: "model.layers.3.self_attn.q_proj" is ("3", "q_proj").

    Of a mixture the layer is the first number and the expert, the second, stays with the kind.
    """
    found = _NUMBER.search(module)
    layer = found.group() if found else "–"
    rest = module[found.end() :].strip(".") if found else module
    parts = [part for part in rest.split(".") if part]
    kind = ".".join(parts[-2:]) if parts and parts[-1].isdigit() else (parts[-1] if parts else module)
    return layer, kind


def _draw_map(one: _Map, row: Layers, values: Sequence[float]) -> Chart:
    places = [place_module(module) for module in row.modules]
    layers = sample(sorted({layer for layer, _ in places}, key=lambda text: (len(text), text)), MOST_LAYERS)
    kinds = sample(list(dict.fromkeys(kind for _, kind in places)), MOST_KINDS)
    held: dict[tuple[str, str], list[float]] = {}
    for place, value in zip(places, values, strict=True):
        held.setdefault(place, []).append(value)
    cells: list[tuple[Number, ...]] = []
    for y, layer in enumerate(layers):
        for x, kind in enumerate(kinds):
            found = held.get((layer, kind))
            if found:  # several of one place are modules whose names differ elsewhere
                cells.append((x, y, number(sum(found) / len(found), 4)))
    return Chart(
        f"layers-{one.key}",
        "heat",
        f"{one.title} by layer and module",
        Axis("module", names=[to_printable(kind, 40) for kind in kinds]),
        Axis("layer", names=[to_printable(layer, 40) for layer in layers]),
        [Series("", cells)],
        one.note,
        one.scale,
    )


def _course(one: _Map, told: Sequence[Layers]) -> list[Chart]:
    """The mean over modules, with the lowest and the highest, over the rounds; nothing where it does not change."""
    points = []
    for row in sample(told):
        values = one.read(row)
        if values:
            mean = sum(values) / len(values)
            points.append((row.round, *(number(value, 4) for value in (mean, min(values), max(values)))))
    if len({point[1:] for point in points}) < 2:
        return []
    title, x = f"{one.title} over the rounds", Axis("round", whole=True)
    note = "Mean over modules; the band is from the lowest to the highest."
    series = [Series("mean over modules", points, -1, "bold")]
    return [Chart(f"course-{one.key}", "lines", title, x, one.scale, series, note)]
