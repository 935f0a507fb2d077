"""The picture of the front: score against share of dense FedIT's bytes, a panel a testbed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.points import EXACT_MATCH, PUBLISHED, SHARE_OF_GAIN, Point, best_at_each_budget
from experiments.sending import Sending
from fedloom.methods.table import METHODS
from fedloom.report.figure import COLOURS, LINES, STYLE, legend_label, line_style, save_figure

TOPS = {EXACT_MATCH: 101.0, SHARE_OF_GAIN: 103.0}
"""The upper end of the axis of scores."""
FOOT, LOWEST_FOOT = 70.0, 30.0
"""The lower end for shares of a gain, and how far it goes down for points below it; what lies lower still is noted."""
LEADING = ("loom", "fedit", "fedsrd", "fedsrd-e", "florist")
"""Methods of the first colours."""
TITLES = {EXACT_MATCH: "held-out exact match (%)", SHARE_OF_GAIN: "share of dense FedIT's gain that is kept (%)"}


@dataclass(frozen=True, slots=True)
class Axis:
    """What scores are drawn against: its value at a point, what a panel calls it, whether points are joined."""

    of: Callable[[Point], float]
    title: Callable[[Point], str]
    joined: bool = True


BYTES = Axis(lambda p: 100 * p.share, lambda p: f"bytes, both ways, of dense fp32 FedIT of {p.rank} (%)")
WORK = Axis(
    lambda p: p.work.passes,
    lambda p: "forward passes of a client in a run, by the example; a backward one is two",
    joined=False,
)


def front(
    points: Sequence[Point],
    target: Path | IO[bytes],
    *,
    own: str = "loom",
    sending: Mapping[str, Sending] | None = None,
    axis: Axis = BYTES,
) -> None:
    """Score against share of dense bytes, a panel a testbed: a line a method through its best at each budget, hollow
    marks for what papers set; bars are 95 % intervals over seeds. axis: another measure than bytes.

    sending: testbed → what its data weigh, drawn as upright lines.
    """
    testbeds = list(dict.fromkeys(p.testbed for p in points))
    slots = assign_slots(points)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4 * max(len(testbeds), 1) + 1.6, 4.6), layout="constrained")
        panels = figure.subplots(1, max(len(testbeds), 1), squeeze=False)[0]
        for axes, testbed in zip(panels, testbeds, strict=False):
            here = best_at_each_budget([p for p in points if p.testbed == testbed])
            _lay_out(axes, here, axis)
            for method, slot in slots.items():
                _front_of([p for p in here if p.method == method], axes, axis, slot, method == own)
            if sending and testbed in sending:
                _draw_sending(axes, sending[testbed], here)
        handles = {text: line for a in panels for line, text in zip(*a.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=9)
        save_figure(figure, target, "png")


def assign_slots(points: Sequence[Point]) -> dict[str, int]:
    """Method → the number of its line, by which it looks the same in every picture; in the order of the legend."""
    known = list(dict.fromkeys([*LEADING, *METHODS, *(p.method for p in points)]))
    return {method: known.index(method) for method in sorted({p.method for p in points}, key=known.index)}


def _lay_out(axes: Axes, points: Sequence[Point], axis: Axis) -> None:
    """Title, scales and names of a panel's axes."""
    first = points[0]
    axes.set_title(legend_label(first.testbed))
    axes.set_xscale("log")
    axes.set_xlabel(axis.title(first))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(foot_of(points), top_of(points))
    axes.set_ylabel(TITLES[first.metric])


def foot_of(points: Sequence[Point]) -> float:
    """The lower end of a panel's scores."""
    if points[0].metric == EXACT_MATCH:
        return 0.0
    lowest = min((p.score for p in points if math.isfinite(p.score)), default=FOOT)
    return min(FOOT, max(LOWEST_FOOT, 10 * math.floor(lowest / 10)))


def top_of(points: Sequence[Point]) -> float:
    """The upper end of a panel's scores: a share of a gain may be above that of dense FedIT."""
    top = TOPS[points[0].metric]
    if points[0].metric == EXACT_MATCH:
        return top
    return max([top, *(math.ceil(p.score) + 2.0 for p in points if math.isfinite(p.score))])


def _draw_sending(axes: Axes, found: Sending, points: Sequence[Point]) -> None:
    """Upright lines at what it takes to send the data once, as a share of a client's dense bytes."""
    dense = next((p.client / p.share for p in points if p.share > 0 and math.isfinite(p.client)), math.nan)
    if not math.isfinite(dense):
        return
    low, high = axes.get_xlim()
    texts = ("send the data (xz)", "send the data, coded by the base model")
    ends = sorted(zip((100 * bytes / dense for bytes in (found.xz, found.coded)), texts, strict=True))
    axes.set_xlim(min(low, ends[0][0] / 1.8), max(high, ends[1][0] * 1.2))  # room for the text left of the first line
    close = ends[1][0] < 1.4 * ends[0][0]  # then the second text stands on the outer side, so as not to cover the first
    for (end, text), side in zip(ends, ("right", "left" if close else "right"), strict=True):
        axes.axvline(end, color="0.45", linewidth=1.1, linestyle=(0, (4, 3)), zorder=0)
        axes.text(
            end,
            0.03,
            f" {text} ",
            transform=axes.get_xaxis_transform(),
            rotation=90,
            va="bottom",
            ha=side,
            fontsize=7.5,
            color="0.35",
            in_layout=False,
        )


def _front_of(points: Sequence[Point], axes: Axes, axis: Axis, number: int, bold: bool) -> None:
    """One method's points: the chosen ones joined in order of bytes, the published ones alone."""
    colour, marker = line_style(number)
    for published in (False, True):
        some = [p for p in points if (p.budget == PUBLISHED) == published and math.isfinite(p.score)]
        shown = sorted(some, key=axis.of)
        if not shown:
            continue
        axes.errorbar(
            [axis.of(p) for p in shown],
            [p.score for p in shown],
            [p.half for p in shown],
            label=legend_label(f"{shown[0].method}{', as published' if published else ''}"),
            color=colour,
            marker=marker,
            markerfacecolor="white" if published else colour,
            linestyle="none" if published or not axis.joined else LINES[number // len(COLOURS)],
            linewidth=2.8 if bold else 1.4,
            markersize=6 if bold else 5,
            capsize=2,
            elinewidth=0.9,
        )
        _note_below(axes, shown, axis, colour, published)


def _note_below(axes: Axes, points: Sequence[Point], axis: Axis, colour: str, hollow: bool) -> None:
    """Points below the axis, as triangles at its foot with their score."""
    bottom, top = axes.get_ylim()
    for point in points:
        if point.score >= bottom:
            continue
        axes.plot(
            axis.of(point),
            bottom + 0.02 * (top - bottom),
            marker="v",
            color=colour,
            markerfacecolor="white" if hollow else colour,
            markersize=6,
            linestyle="none",
            clip_on=False,
        )
        axes.annotate(
            f"{point.score:.0f}",
            (axis.of(point), bottom + 0.02 * (top - bottom)),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=colour,
        )
