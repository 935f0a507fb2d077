"""Held-out score against rounds and against bytes: one run with its domains, or several runs with intervals."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedloom.records.text import to_printable
from fedloom.report.numbers import MEAN, Report, human_bytes, interval

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
    """Draw one run: the mean in bold, every domain thin. `form` is "png" or "svg"."""
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels()
        sent = f"{human_bytes(report.totals.bytes)} in all; {report.baseline.name}: {human_bytes(report.dense_bytes)}"
        for axes, xs in zip(panels, _axes_of(report), strict=True):
            for number, domain in enumerate(report.domains):
                colour, marker = line_style(number)
                ys = [100 * point.scores.get(domain, float("nan")) for point in report.points]
                axes.plot(xs, ys, lw=1.1, ms=3.5, alpha=0.85, label=legend_label(domain), color=colour, marker=marker)
            ys = [100 * point.scores[MEAN] for point in report.points]
            axes.plot(xs, ys, color=INK, linewidth=2.6, label=MEAN)
        panels[0].set_title(f"{legend_label(report.run.method)}, {len(report.run.clients)} clients")
        panels[1].set_title(sent)
        panels[0].legend(loc="best", fontsize=9)
        save_figure(figure, target, form)


def draw_comparison(groups: Mapping[str, Sequence[Report]], target: Path | IO[bytes], *, form: str = "png") -> None:
    """Overlay several runs: label → its runs, one a seed. Lines are means over seeds, bands their 95 % intervals."""
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels()
        for number, (name, reports) in enumerate(groups.items()):
            stretches, (colour, marker) = _over_seeds(reports), line_style(number)
            for axes, along in zip(panels, ("round", "mib"), strict=True):
                shown = [s for s in stretches if along == "round" or s.mib > 0]
                xs = [getattr(s, along) for s in shown]
                means = [s.mean for s in shown]
                line = LINES[number // len(COLOURS)]
                axes.plot(xs, means, line, lw=1.8, ms=4, label=legend_label(name), color=colour, marker=marker)
                low, high = [s.mean - s.half for s in shown], [s.mean + s.half for s in shown]
                axes.fill_between(xs, low, high, color=colour, alpha=0.1, linewidth=0)
        panels[0].set_title("mean over domains; bands: 95 % intervals over seeds")
        panels[1].set_title("the same against bytes, both ways")
        if any(report.points for reports in groups.values() for report in reports):  # a logarithm needs a number
            panels[1].set_xscale("log")
            panels[1].xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panels[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panels[1].xaxis.set_minor_formatter(NullFormatter())
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
        save_figure(figure, target, form)


def draw_svg(report: Report) -> str:
    """The picture of one run as an <svg> element, the same bytes for the same report."""
    buffer = io.BytesIO()
    draw_curve(report, buffer, form="svg")
    text = buffer.getvalue().decode()
    return text[text.index("<svg") :]


def _axes_of(report: Report) -> tuple[list[float], list[float]]:
    """Rounds, and MiB sent by then."""
    return [float(p.round) for p in report.points], [p.bytes / MIB for p in report.points]


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Several runs after one round: mean score and half its interval (percent), mean MiB sent by then."""

    round: int
    mib: float
    mean: float
    half: float


def _over_seeds(reports: Sequence[Report]) -> list[_Stretch]:
    """One stretch for each round that all runs evaluated."""
    by_round = [{point.round: point for point in report.points} for report in reports]
    stretches = []
    for round in sorted(set.intersection(*(set(points) for points in by_round))):
        mib = sum(points[round].bytes for points in by_round) / len(by_round) / MIB
        mean, half = interval([100 * points[round].scores[MEAN] for points in by_round])
        stretches.append(_Stretch(round, mib, mean, half))
    return stretches


def line_style(number: int) -> tuple[str, str]:
    """Colour and marker of the n-th line."""
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def legend_label(name: str) -> str:
    """A name in a legend. matplotlib leaves out those that begin with an underscore; a space before it brings it in."""
    shown = to_printable(name, _LABEL)
    return f" {shown}" if shown.startswith("_") else shown


def _panels() -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_xlabel("round")
    left.set_ylabel("held-out exact match (%)")
    right.set_xlabel("sent so far, both ways (MiB)")
    left.set_ylim(0, 101)
    left.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure, [left, right]


def save_figure(figure: Figure, target: Path | IO[bytes], form: str) -> None:
    """Write a figure without the date or the version, so that the same figure is the same bytes."""
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[form]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # boxes will do for other scripts
        figure.savefig(target, format=form, dpi=160, metadata=metadata)
