"""What a run amounts to, from its ledger alone: closing tables, a picture, one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedloom.records.ledger import Row, read_rows
from fedloom.report.numbers import Report, summarise

__all__ = ["Report", "summarise", "write_report"]


def write_report(folder: Path, rows: Sequence[Row] | None = None) -> Report:
    """Write `curve.png` and `report.html` into a run's folder. rows: of its ledger, which is read if left out."""
    from fedloom.report.figure import draw_curve
    from fedloom.report.page import page_of, write_html

    rows = read_rows(folder / "ledger.jsonl") if rows is None else rows
    report = summarise(rows, str(folder))
    draw_curve(report, folder / "curve.png")
    (folder / "report.html").write_text(write_html(page_of(folder, report, rows)), encoding="utf-8")
    return report
