"""The numbers of a chart as rows of text: the table beside it on a page, and its CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from fedloom.report.facts import human_seconds
from fedloom.report.numbers import human_bytes
from fedloom.report.page.charts import Axis, Chart, Number
from fedloom.report.sampling import sample
from fedloom.report.tables import in_spreadsheet

MOST_ROWS = 60
"""Rows of the table beside a chart: more are for the CSV, which has all of them."""


def show_value(value: Number, axis: Axis) -> str:
    """A value of an axis with its unit, or the name of a category."""
    if value is None:
        return "–"
    if axis.names:
        return axis.names[int(value)]
    if axis.unit == "bytes":
        return human_bytes(value)
    if axis.unit == "seconds":
        return human_seconds(value)
    text = f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return f"{text} %" if axis.unit == "%" else text


def chart_table(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """(head, rows) that say what the chart shows: a column a series, or of a map a column a name of its x axis."""
    if chart.kind == "heat":
        return _map_table(chart)
    if chart.kind == "dots":
        head = ["", _title(chart.x), _title(chart.y)]
        return head, [
            [series.name, show_value(point[0], chart.x), _with_ends(point, chart.y)]
            for series in chart.series
            for point in series.points
        ]
    lying = chart.kind == "bars"  # a bar is (length, place)
    key, value = (chart.y, chart.x) if lying else (chart.x, chart.y)
    held: dict[float, dict[int, str]] = {}
    for column, series in enumerate(chart.series):
        for point in series.points:
            if not lying and point[0] is not None:
                held.setdefault(point[0], {})[column] = _with_ends(point, value)
            elif lying and point[1] is not None:
                held.setdefault(point[1], {})[column] = show_value(point[0], value)
    columns = range(len(chart.series))
    rows = [[show_value(place, key), *(cells.get(c, "–") for c in columns)] for place, cells in sorted(held.items())]
    return [_title(key), *(series.name for series in chart.series)], list(sample(rows, MOST_ROWS))


def _title(axis: Axis) -> str:
    return axis.title


def _with_ends(point: Sequence[Number], axis: Axis) -> str:
    """A value with the ends of its interval, where it has one."""
    text = show_value(point[1], axis)
    if len(point) < 4 or point[1] is None:
        return text
    return f"{text} ({show_value(point[2], axis)} to {show_value(point[3], axis)})"


def _map_table(chart: Chart) -> tuple[list[str], list[list[str]]]:
    scale = chart.scale or Axis("")
    held = {(x, y): show_value(value, scale) for series in chart.series for x, y, value in series.points}
    columns = range(len(chart.x.names))
    rows = [[name, *(held.get((x, y), "–") for x in columns)] for y, name in enumerate(chart.y.names)]
    return [chart.y.title, *chart.x.names], rows


def chart_csv(chart: Chart) -> str:
    """Every point of the chart in a row of its own, in base units: bytes, seconds, percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    x, y = _column(chart.x), _column(chart.y)
    if chart.kind == "heat":
        scale = chart.scale or Axis("value")
        writer.writerow([x, y, _column(scale) or "state"])
    else:
        writer.writerow(["series", x, y, "low", "high"])
    for series in chart.series:
        for point in series.points:
            if chart.kind == "heat":
                cells = [chart.x.names[int(point[0] or 0)], chart.y.names[int(point[1] or 0)], _raw(point[2], scale)]
            else:
                ends = [_raw(value, chart.y) for value in point[2:4]] or ["", ""]
                cells = [series.name, _raw(point[0], chart.x), _raw(point[1], chart.y), *ends]
            writer.writerow([in_spreadsheet(cell) for cell in cells])
    return text.getvalue()


def _column(axis: Axis) -> str:
    return f"{axis.title} ({axis.unit})" if axis.unit and axis.unit not in axis.title else axis.title


def _raw(value: Number, axis: Axis) -> str:
    if value is None:
        return ""
    return axis.names[int(value)] if axis.names else f"{value:.10g}"
