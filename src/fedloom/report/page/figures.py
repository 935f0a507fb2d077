"""The figures of a page as files: CSV from the same numbers, SVG and PNG through matplotlib."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedloom.report.page.charts import Chart
from fedloom.report.page.model import Page
from fedloom.report.page.values import chart_csv


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure."""

    chart: Chart

    @property
    def name(self) -> str:
        """The name of its files, without an ending."""
        return self.chart.id

    def csv(self) -> str:
        """Its numbers: one row a point."""
        return chart_csv(self.chart)

    def svg(self) -> bytes:
        """As a drawing, in UTF-8; the same bytes for the same chart."""
        from fedloom.report.page.draw import draw_chart  # matplotlib takes a moment to load

        return draw_chart(self.chart, "svg")

    def png(self) -> bytes:
        """As an image; the same bytes for the same chart."""
        from fedloom.report.page.draw import draw_chart

        return draw_chart(self.chart, "png")


def list_figures(page: Page) -> list[Figure]:
    """Every figure of the page, in order."""
    return [Figure(chart) for chart in page.charts]


def write_figures(page: Page, folder: Path) -> list[Path]:
    """Every figure as CSV, SVG and PNG in a folder, which is made if need be. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for figure in list_figures(page):
        for ending, content in (("csv", figure.csv().encode()), ("svg", figure.svg()), ("png", figure.png())):
            written.append(folder / f"{figure.name}.{ending}")
            written[-1].write_bytes(content)
    return written
