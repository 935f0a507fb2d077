"""A chart of a page drawn by matplotlib: the same description as the interactive one, for papers and slides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def _set_scale(axes: Axes, which: Literal["x", "y"], axis: Axis, values: Sequence[float]) -> Callable[[Number], float]:
    """Name one axis and fit its scale; returns what turns a value into what is drawn."""
    by, unit = _unit(axis, values)
    title = axis.title if not unit or f"({unit})" in axis.title else f"{axis.title} ({unit})"
    getattr(axes, f"set_{which}label")(title.replace("bytes (", "(") if axis.title == "bytes" else title)
    known = [value for value in values if value > 0]
    if axis.log and known and len(known) == len(values) and max(known) / min(known) >= _WIDE_LOG:
        figure.set_logarithm(axes, which)
    elif axis.low is not None or axis.high is not None:
        low, high = (None if end is None else end / by for end in (axis.low, axis.high))
        getattr(axes, f"set_{which}lim")(low, None if high is None else high * 1.01)
    return lambda value: math.nan if value is None else value / by


def _known(points: Sequence[Sequence[Number]], places: Sequence[int]) -> list[float]:
    return [value for point in points for place in places if place < len(point) and (value := point[place]) is not None]


def _draw_lines(chart: Chart, axes: Axes) -> None:
    points = [point for series in chart.series for point in series.points]
    for series in chart.series:
        colour, marker = _look(series)
        xs, ys = _columns(series, points, chart, axes)
        width = {"thin": 1.1, "bold": 2.4, "": 1.8}[series.style]
        shown = marker if len(xs) <= 30 else None
        axes.plot(xs, ys[0], lw=width, ms=3.5, marker=shown, color=colour, label=figure.legend_label(series.name))
        if len(ys) > 1:
            axes.fill_between(xs, ys[1], ys[2], color=colour, alpha=0.13, linewidth=0)


def _columns(
    series: Series, points: Sequence[Sequence[Number]], chart: Chart, axes: Axes
) -> tuple[list[float], list[list[float]]]:
    """x, and y with the ends of its intervals where there are any, in what the axes are drawn in."""
    x = _set_scale(axes, "x", chart.x, _known(points, (0,)))
    y = _set_scale(axes, "y", chart.y, _known(points, (1, 2, 3)))
    places = (1, 2, 3) if all(len(point) > 3 for point in series.points) and series.points else (1,)
    return [x(point[0]) for point in series.points], [[y(point[place]) for point in series.points] for place in places]


def _draw_stack(chart: Chart, axes: Axes) -> None:
    sums: dict[float, float] = {}
    for series in chart.series:
        for point in series.points:
            sums[point[0] or 0.0] = sums.get(point[0] or 0.0, 0.0) + (point[1] or 0.0)
    x = _set_scale(axes, "x", chart.x, list(sums))
    y = _set_scale(axes, "y", chart.y, list(sums.values()))
    xs = [x(place) for place in sums]
    rows = [[y(dict(map(tuple, s.points)).get(place, 0.0)) for place in sums] for s in chart.series]  # type: ignore[arg-type]
    colours = [_look(series)[0] for series in chart.series]
    axes.stackplot(xs, rows, labels=[series.name for series in chart.series], colors=colours, alpha=0.8)


def _draw_bars(chart: Chart, axes: Axes) -> None:
    names = [figure.legend_label(name[:_NAME]) for name in chart.y.names]
    sums = [0.0] * len(names)
    for series in chart.series:
        for length, place in series.points:
            sums[int(place or 0)] += length or 0.0
    x, left = _set_scale(axes, "x", chart.x, sums), [0.0] * len(names)
    for series in chart.series:
        sizes = [0.0] * len(names)
        for length, place in series.points:
            sizes[int(place or 0)] = x(length)
        axes.barh(range(len(names)), sizes, left=left, color=_look(series)[0], label=series.name, height=0.62)
        left = [held + size for held, size in zip(left, sizes, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _draw_dots(chart: Chart, axes: Axes) -> None:
    points = [point for series in chart.series for point in series.points]
    for series in chart.series:
        xs, ys = _columns(series, points, chart, axes)
        colour, marker = _look(series)
        if series.slot < 0:
            axes.plot(xs, ys[0], "--", lw=0.9, color="#777777", zorder=1, label=series.name)
            continue
        ends = [[m - low for m, low in zip(ys[0], ys[1], strict=True)], [h - m for m, h in zip(ys[0], ys[2], strict=True)]] if len(ys) > 1 else None
        axes.errorbar(xs, ys[0], yerr=ends, fmt=marker, ms=8, color=colour, elinewidth=1.2, label=figure.legend_label(series.name))


def _draw_map(chart: Chart, axes: Axes) -> None:
    scale = chart.scale or Axis("")
    grid = [[math.nan] * len(chart.x.names) for _ in chart.y.names]
    for series in chart.series:
        for x, y, value in series.points:
            grid[int(y or 0)][int(x or 0)] = math.nan if value is None else value
    names = [figure.legend_label(name[:_NAME]) for name in chart.x.names]
    turned = max(map(len, names), default=0) > 4
    if scale.names:
        figure.fill_map(axes, grid, _STATES, (-0.5, len(_STATES) - 0.5), list(scale.names), scale.title)
    else:
        figure.fill_map(axes, grid, _MAP, (scale.low, scale.high), [], scale.title + (" (%)" if scale.unit == "%" else ""))
    every = max(1, len(names) // 30)
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=40 if turned else 0, ha="right" if turned else "center")
    step = max(1, len(chart.y.names) // 50)
    axes.set_yticks(range(0, len(chart.y.names), step), [figure.legend_label(n[:_NAME]) for n in chart.y.names[::step]])
    axes.set_xlabel(chart.x.title)
    axes.set_ylabel(chart.y.title)
    axes.grid(visible=False)


def _look(series: Series) -> tuple[str, str]:
    """Colour and marker."""
    return (figure.INK, "") if series.slot < 0 else figure.line_style(series.slot)
