"""The figures of a page as files: CSV from the same numbers, SVG and PNG through matplotlib."""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.report.page.charts import Chart
from fedloom.report.page.model import Page


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure. name: of its files, without an ending."""

    chart: Chart

    @property
    def name(self) -> str:
        """The name of its files, without an ending."""
        return self.chart.id

    def csv(self) -> str:
        """Its numbers: one row a point."""
        raise NotImplementedError

    def svg(self) -> bytes:
        """As a drawing, in UTF-8."""
        raise NotImplementedError

    def png(self) -> bytes:
        """As an image."""
        raise NotImplementedError


def list_figures(page: Page) -> list[Figure]:
    """Every figure of the page, in order."""
    return [Figure(chart) for chart in page.charts]
