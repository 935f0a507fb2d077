"""Held-out scores against rounds and against bytes: one run with its domains, or several runs with intervals.

Every measure has a row of panels, the leading one on top (`measures`). Where nothing was held out, the training loss is
drawn.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedloom.records.text import to_printable
from fedloom.report.curves import Stretch, over_seeds, points_of, shown_value
from fedloom.report.measures import EXACT_MATCH, TRAINING_LOSS, Measure, list_pictured
from fedloom.report.numbers import MEAN, Report, human_bytes
from fedloom.report.sampling import sample

MIB = 2**20
INK = "#222222"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C00", "#000000")
"""Okabe and Ito's palette, told apart with every common kind of colour vision (its yellow darkened for white paper)."""
LINES = ("-", "--", "-.", ":", "-")
"""Styles of line, for more runs than there are colours."""
_LABEL = 60
"""Characters of a name in a legend."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "svg.hashsalt": "fedloom",
    "text.parse_math": False,  # names are others' text: a $ in them is a $
}


def draw_curve(report: Report, target: Path | IO[bytes], *, form: str = "png") -> None:
    """Draw one run: the mean in bold, every domain thin; a row of panels a measure. `form` is "png" or "svg"."""
    with matplotlib.rc_context(STYLE):
        figure, rows = _panels(_pictured([report]))
        sent = f"{human_bytes(report.totals.bytes)} in all; {report.baseline.name}: {human_bytes(report.dense_bytes)}"
        for measure, panels in rows:
            points = sample(points_of(report, measure))
            axes_of = ([float(p.round) for p in points], [p.bytes / MIB for p in points])
            for axes, xs in zip(panels, axes_of, strict=True):
                for number, domain in enumerate(report.domains):
                    colour, marker = line_style(number)
                    ys = [shown_value(point, measure, domain) for point in points]
                    label = legend_label(domain)
                    axes.plot(xs, ys, lw=1.1, ms=3.5, alpha=0.85, label=label, color=colour, marker=marker)
                ys = [shown_value(point, measure, MEAN) for point in points]
                axes.plot(xs, ys, color=INK, linewidth=2.6, label=MEAN)
            _begin_at_0(panels[0], measure)
        left, right = rows[0][1]
        left.set_title(f"{legend_label(report.run.method)}, {len(report.run.clients)} clients")
        right.set_title(sent)
        if report.domains:
            left.legend(loc="best", fontsize=9)
        save_figure(figure, target, form)


def draw_comparison(groups: Mapping[str, Sequence[Report]], target: Path | IO[bytes], *, form: str = "png") -> None:
    """Overlay several runs: label → its runs, one a seed; a row of panels for every measure.

    Lines are means over seeds, bands their 95 % intervals.
    """
    with matplotlib.rc_context(STYLE):
        figure, rows = _panels(_pictured([report for reports in groups.values() for report in reports]))
        for measure, (left, right) in rows:
            for number, (name, reports) in enumerate(groups.items()):
                stretches = over_seeds(reports, measure)
                _overlay(left, [(float(s.round), s) for s in stretches], name, number)
                _overlay(right, [(s.bytes / MIB, s) for s in stretches if s.bytes > 0], name, number)
            _begin_at_0(left, measure)
            if right.lines:  # a logarithm needs a number
                set_logarithm(right, "x")
        left, right = rows[0][1]
        over = "clients; nothing was held out" if rows[0][0] == TRAINING_LOSS else "domains"
        left.set_title(f"mean over {over}; bands: 95 % intervals over seeds")
        right.set_title("the same against bytes, both ways")
        if left.lines:
            figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=9)
        save_figure(figure, target, form)


def _begin_at_0(axes: Axes, measure: Measure) -> None:
    """The scale of a metric of the user's, once its lines are drawn: from 0 up to what it reaches."""
    if measure.unit == "%" and measure != EXACT_MATCH:
        axes.set_ylim(bottom=0)


def _overlay(axes: Axes, along: Sequence[tuple[float, Stretch]], name: str, number: int) -> None:
    """One label's line and band; nothing where no seed has a point."""
    if not along:
        return
    colour, marker = line_style(number)
    xs, shown = [x for x, _ in along], [stretch for _, stretch in along]
    line = LINES[number // len(COLOURS) % len(LINES)]
    axes.plot(xs, [s.mean for s in shown], line, lw=1.8, ms=4, label=legend_label(name), color=colour, marker=marker)
    low, high = [s.mean - s.half for s in shown], [s.mean + s.half for s in shown]
    axes.fill_between(xs, low, high, color=colour, alpha=0.1, linewidth=0)


def _pictured(reports: Sequence[Report]) -> list[Measure]:
    """What the picture shows: the measures, or the training loss where nothing was held out."""
    return list_pictured(reports) or [TRAINING_LOSS]


def line_style(number: int) -> tuple[str, str]:
    """Colour and marker of the n-th line: a colour that comes again has another marker."""
    lap, slot = divmod(number, len(COLOURS))
    return COLOURS[slot], MARKERS[(slot + 3 * lap) % len(MARKERS)]


def legend_label(name: str) -> str:
    """A name in a legend. matplotlib leaves out those that begin with an underscore; a space before it brings it in."""
    shown = to_printable(name, _LABEL)
    return f" {shown}" if shown.startswith("_") else shown


def _panels(measures: Sequence[Measure]) -> tuple[Figure, list[tuple[Measure, list[Axes]]]]:
    """A row of two panels for every measure: against rounds, and against bytes."""
    figure = Figure(figsize=(10.5, 1.2 + 2.8 * len(measures)), layout="constrained")
    grid = figure.subplots(len(measures), 2, sharey="row", sharex="col", squeeze=False)
    rows = []
    for measure, (left, right) in zip(measures, grid, strict=True):
        held_out = "" if measure == TRAINING_LOSS else "held-out "
        left.set_ylabel(f"{held_out}{to_printable(measure.title, _LABEL)}")
        if measure == EXACT_MATCH:
            left.set_ylim(0, 101)
        rows.append((measure, [left, right]))
    grid[-1][0].set_xlabel("round")
    grid[-1][1].set_xlabel("sent so far, both ways (MiB)")
    mark_whole(grid[-1][0])
    return figure, rows


def draw_panel(draw: Callable[[Axes], None], size: tuple[float, float], form: str) -> bytes:
    """A picture of one panel, which `draw` fills. size: width and height in inches."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        save_figure(figure, buffer, form)
    return buffer.getvalue()


def set_logarithm(axes: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic scale whose marks are plain numbers."""
    getattr(axes, f"set_{which}scale")("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def mark_whole(axes: Axes) -> None:
    """Marks of whole numbers on the x axis."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def fill_map(
    axes: Axes,
    grid: Sequence[Sequence[float]],
    colours: Sequence[str],
    ends: tuple[float | None, float | None],
    names: Sequence[str],
    title: str,
) -> None:
    """A map of cells with its scale beside it. names: of the colours, where they are states and no range."""
    steps = LinearSegmentedColormap.from_list("fedloom", colours)
    map_ = ListedColormap(colours) if names else steps
    drawn = axes.imshow(grid, cmap=map_, vmin=ends[0], vmax=ends[1], aspect="auto", interpolation="nearest")
    bar = axes.figure.colorbar(drawn, ax=axes, label=title, pad=0.02)
    bar.outline.set_visible(False)
    if names:
        bar.set_ticks(range(len(names)), labels=names)


def save_figure(figure: Figure, target: Path | IO[bytes], form: str) -> None:
    """Write a figure without the date or the version, so that the same figure is the same bytes."""
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[form]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # boxes will do for other scripts
        figure.savefig(target, format=form, dpi=160, metadata=metadata)
