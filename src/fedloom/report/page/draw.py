"""A chart of a page drawn by matplotlib: the same description as the interactive one, for papers and slides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedloom.report import figure
from fedloom.report.page.charts import Axis, Chart, Number, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNITS: dict[str, Sequence[tuple[float, str]]] = {
    "bytes": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")),
    "seconds": ((7200, "h"), (180, "min"), (0, "s")),
}
_SECONDS = {"h": 3600.0, "min": 60.0, "s": 1.0}
_STATES = ("#eceff2", "#86c5e4", "#1f8a5f", "#d97b0f", "#c2431d")
"""The states of a map of attendance, as on the page."""
_MAP = ("#eef4fa", "#9fc6e6", "#3f8cc6", "#0b4f8a", "#06294d")
_NAME = 36
"""Characters of a category's name."""
MARKED = 30
"""Points of a line up to which each has its mark."""
_WIDE_LOG = 10.0
"""A logarithm tells nothing where the largest is less than so many times the smallest."""


def draw_chart(chart: Chart, form: str) -> bytes:
    """The chart as an image; form: "png" or "svg"."""
    draw, size = {
        "lines": (_draw_lines, (7.2, 4.2)),
        "stack": (_draw_stack, (7.2, 4.2)),
        "bars": (_draw_bars, (7.2, 1.6 + 0.32 * len(chart.y.names))),
        "dots": (_draw_dots, (7.2, 4.8)),
        "heat": (_draw_map, (2.6 + 0.26 * max(len(chart.x.names), 12), 1.9 + 0.2 * len(chart.y.names))),
    }[chart.kind]

    def fill(axes: Axes) -> None:
        axes.set_title(figure.legend_label(chart.title))
        draw(chart, axes)
        handles, _ = axes.get_legend_handles_labels()
        if len(handles) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8.5)

    return figure.draw_panel(fill, size, form)


def _unit(axis: Axis, values: Sequence[float]) -> tuple[float, str]:
    """(what a value is divided by, the unit's name): the largest unit that fits."""
    most = max(map(abs, values), default=0.0)
    for least, name in _UNITS.get(axis.unit, ()):
        if most >= least:
            return (_SECONDS[name] if axis.unit == "seconds" else least), name
    return 1.0, "B" if axis.unit == "bytes" else axis.unit


@dataclass(frozen=True, slots=True)
class _Scale:
    """One axis of a drawing: what its values are divided by."""

    which: Literal["x", "y"]
    axis: Axis
    by: float

    @classmethod
    def name(cls, axes: Axes, which: Literal["x", "y"], axis: Axis, values: Sequence[float]) -> _Scale:
        """Name the axis, in the unit that fits its values."""
        by, unit = _unit(axis, values)
        title = axis.title if not unit or f"({unit})" in axis.title else f"{axis.title} ({unit})"
        getattr(axes, f"set_{which}label")(unit if axis.title == axis.unit else title)
        known = [value for value in values if value > 0]
        if axis.log and known and len(known) == len(values) and max(known) / min(known) >= _WIDE_LOG:
            figure.set_logarithm(axes, which)
        return cls(which, axis, by)

    def __call__(self, value: Number) -> float:
        """A value as it is drawn."""
        return math.nan if value is None else value / self.by

    def end(self, axes: Axes) -> None:
        """Set the ends that the axis asks for, once all is drawn: the others follow from what is."""
        low, high = (None if end is None else end / self.by for end in (self.axis.low, self.axis.high))
        if low is not None or high is not None:
            getattr(axes, f"set_{self.which}lim")(low, None if high is None else 1.01 * high)


def _known(points: Sequence[Sequence[Number]], places: Sequence[int]) -> list[float]:
    return [value for point in points for place in places if place < len(point) and (value := point[place]) is not None]


def _scales(chart: Chart, axes: Axes) -> tuple[_Scale, _Scale]:
    points = [point for series in chart.series for point in series.points]
    return (
        _Scale.name(axes, "x", chart.x, _known(points, (0,))),
        _Scale.name(axes, "y", chart.y, _known(points, (1, 2, 3))),
    )


def _columns(series: Series, x: _Scale, y: _Scale) -> tuple[list[float], list[list[float]]]:
    """x, and y with the ends of its intervals where there are any, as they are drawn."""
    places = (1, 2, 3) if series.points and all(len(point) > 3 for point in series.points) else (1,)
    return [x(point[0]) for point in series.points], [[y(point[place]) for point in series.points] for place in places]


def _draw_lines(chart: Chart, axes: Axes) -> None:
    x, y = _scales(chart, axes)
    for series in chart.series:
        colour, marker = _look(series)
        xs, ys = _columns(series, x, y)
        width = {"thin": 1.1, "bold": 2.4, "": 1.8}[series.style]
        shown = marker if len(xs) <= MARKED else None
        axes.plot(xs, ys[0], lw=width, ms=3.5, marker=shown, color=colour, label=figure.legend_label(series.name))
        if len(ys) > 1:
            axes.fill_between(xs, ys[1], ys[2], color=colour, alpha=0.13, linewidth=0)
    if chart.x.whole:
        figure.mark_whole(axes)
    for scale in (x, y):
        scale.end(axes)


def _draw_stack(chart: Chart, axes: Axes) -> None:
    held = [{point[0] or 0.0: point[1] or 0.0 for point in series.points} for series in chart.series]
    places = sorted({place for one in held for place in one})
    y = _Scale.name(axes, "y", chart.y, [sum(one.get(place, 0.0) for one in held) for place in places])
    x = _Scale.name(axes, "x", chart.x, places)
    rows = [[y(one.get(place, 0.0)) for place in places] for one in held]
    colours = [_look(series)[0] for series in chart.series]
    axes.stackplot([*map(x, places)], rows, labels=[s.name for s in chart.series], colors=colours, alpha=0.8)
    for scale in (x, y):
        scale.end(axes)


def _draw_bars(chart: Chart, axes: Axes) -> None:
    names = [figure.legend_label(name[:_NAME]) for name in chart.y.names]
    held = [{int(place or 0): length or 0.0 for length, place in series.points} for series in chart.series]
    places = range(len(names))
    x = _Scale.name(axes, "x", chart.x, [sum(one.get(place, 0.0) for one in held) for place in places])
    left = [0.0] * len(names)
    for series, one in zip(chart.series, held, strict=True):
        sizes = [x(one.get(place, 0.0)) for place in places]
        label = figure.legend_label(series.name)
        axes.barh(places, sizes, left=left, color=_look(series)[0], label=label, height=0.62)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    x.end(axes)


def _draw_dots(chart: Chart, axes: Axes) -> None:
    x, y = _scales(chart, axes)
    for series in chart.series:
        xs, ys = _columns(series, x, y)
        colour, marker = _look(series)
        label = figure.legend_label(series.name)
        if series.slot < 0:
            axes.plot(xs, ys[0], "--", lw=0.9, color="#777777", zorder=1, label=label)
            continue
        ends = None
        if len(ys) > 1:
            mean, low, high = ys
            ends = [
                [m - end for m, end in zip(mean, low, strict=True)],
                [end - m for m, end in zip(mean, high, strict=True)],
            ]
        axes.errorbar(xs, ys[0], yerr=ends, fmt=marker, ms=8, color=colour, elinewidth=1.2, label=label)
    for scale in (x, y):
        scale.end(axes)


def _draw_map(chart: Chart, axes: Axes) -> None:
    scale = chart.scale or Axis("")
    grid = [[math.nan] * len(chart.x.names) for _ in chart.y.names]
    for series in chart.series:
        for x, y, value in series.points:
            grid[int(y or 0)][int(x or 0)] = math.nan if value is None else value
    names = [figure.legend_label(name[:_NAME]) for name in chart.x.names]
    turned = max(map(len, names), default=0) > 4
    unit = " (%)" if scale.unit == "%" else ""
    ends = (-0.5, len(_STATES) - 0.5) if scale.names else (scale.low, scale.high)
    figure.fill_map(axes, grid, _STATES if scale.names else _MAP, ends, list(scale.names), scale.title + unit)
    every, step = max(1, len(names) // 30), max(1, len(chart.y.names) // 50)
    rows = [figure.legend_label(name[:_NAME]) for name in chart.y.names]
    axes.set_xticks(range(0, len(names), every), names[::every])
    axes.tick_params("x", rotation=40 if turned else 0, rotation_mode="xtick")
    axes.set_yticks(range(0, len(rows), step), rows[::step])
    axes.set_xlabel(chart.x.title)
    axes.set_ylabel(chart.y.title)
    axes.grid(visible=False)


def _look(series: Series) -> tuple[str, str]:
    """Colour and marker."""
    return (figure.INK, "") if series.slot < 0 else figure.line_style(series.slot)
