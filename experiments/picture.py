"""The picture of the front: score against share of dense FedIT's bytes, a panel a testbed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.points import PUBLISHED, Point
from fedloom.report.figure import COLOURS, LINES, STYLE, legend_label, line_style, save_figure


def front(points: Sequence[Point], target: Path | IO[bytes], *, own: str = "loom") -> None:
    """Score against share of dense bytes, a panel a testbed: a line a method through what was chosen for each budget,
    hollow marks for what papers set; bars are 95 % intervals over seeds.
    """
    testbeds, methods = list(dict.fromkeys(p.testbed for p in points)), list(dict.fromkeys(p.method for p in points))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4 * max(len(testbeds), 1) + 1.6, 4.6), layout="constrained")
        panels = figure.subplots(1, max(len(testbeds), 1), sharey=True, squeeze=False)[0]
        for axes, testbed in zip(panels, testbeds, strict=False):
            for number, method in enumerate(methods):
                _front_of(
                    [p for p in points if (p.testbed, p.method) == (testbed, method)], axes, number, method == own
                )
            axes.set_title(legend_label(testbed))
            axes.set_xscale("log")
            rank = next(p.rank for p in points if p.testbed == testbed)
            axes.set_xlabel(f"bytes, both ways, of dense fp32 FedIT of {rank} (%)")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_ylim(0, 101)
        panels[0].set_ylabel("held-out exact match (%)")
        handles = {text: line for a in panels for line, text in zip(*a.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=9)
        save_figure(figure, target, "png")


def _front_of(points: Sequence[Point], axes: Axes, number: int, bold: bool) -> None:
    """One method's points: the chosen ones joined in order of bytes, the published ones alone."""
    colour, marker = line_style(number)
    for published in (False, True):
        shown = sorted((p for p in points if (p.budget == PUBLISHED) == published), key=lambda p: p.share)
        if shown:
            axes.errorbar(
                [100 * p.share for p in shown],
                [p.score for p in shown],
                [p.half for p in shown],
                label=legend_label(f"{shown[0].method}{', as published' if published else ''}"),
                color=colour,
                marker=marker,
                markerfacecolor="white" if published else colour,
                linestyle="none" if published else LINES[number // len(COLOURS)],
                linewidth=2.8 if bold else 1.4,
                markersize=6 if bold else 5,
                capsize=2,
                elinewidth=0.9,
            )
