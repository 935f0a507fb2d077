"""A picture as plain data: what its lines, bars or cells are, in which units, under which names.

One description has many renderings: the interactive chart and the table of the page, a PNG or SVG through matplotlib,
a CSV. So they cannot say different things.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Unit: TypeAlias = Literal["", "bytes", "seconds", "%"]
Style: TypeAlias = Literal["", "thin", "bold"]
Number: TypeAlias = float | None
"""None where nothing was measured: JSON has no NaN, and a line has a gap there."""


@dataclass(frozen=True, slots=True)
class Axis:
    """title: what is measured, without the unit. log: whether it is drawn on a logarithmic scale.

    low, high: the ends of the scale where they are not to follow from the data. names: the categories, in order, where
    the axis has no numbers.
    """

    title: str
    unit: Unit = ""
    log: bool = False
    low: float | None = None
    high: float | None = None
    names: Sequence[str] = ()
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or the bars or points of one name.

    points: (x, y), and (x, y, low, high) where there is an interval; the x of a category is its place in `Axis.names`.
    slot: which of the palette's colours; -1 for that of text. style: "thin" for a line that stands beside a bold one.
    """

    name: str
    points: Sequence[Sequence[Number]]
    slot: int = 0
    style: Style = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """kind: "lines"; "stack", the same as areas one upon the other; "bars", lying, (length, place in y.names), one
    after the other where there are several series; "dots", named points, and a series with several is a line; "heat",
    where a point is (place in x.names, place in y.names, value).

    id: its name in links and files. title: of the figure. note: what is to be known of it, in a sentence or two.
    scale: what the values of a heat map are.
    """

    id: str
    kind: Literal["lines", "stack", "bars", "dots", "heat"]
    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    note: str = ""
    scale: Axis | None = None


def number(value: float, digits: int = 6) -> Number:
    """A value for a chart, in so many digits: more make a page longer and no picture better."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
