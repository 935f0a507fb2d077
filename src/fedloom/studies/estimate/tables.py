"""An estimate for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fedloom.records.text import cell, to_printable
from fedloom.report.numbers import human_bytes
from fedloom.studies.estimate.published import MIB
from fedloom.studies.estimate.rounds import CODINGS, PAPER


def estimate_tables(result: Mapping[str, Any]) -> list[Table]:
    """What `run_estimate` returned, for a terminal."""
    refused = [row for row in result["rows"] if "refused" in row]
    return [
        _round_table(result),
        *([_refused_table(refused)] if refused else []),
        *([_published_table(result)] if result["published"] else []),
    ]


def fitting_unit(sizes: Sequence[float]) -> tuple[str, int]:
    """(name, bytes) of the unit in which the smallest of some sizes still has a digit before the point, or KiB."""
    smallest = min((size for size in sizes if size > 0), default=MIB)
    return ("MiB", MIB) if smallest >= MIB / 10 else ("KiB", 1024)


def _round_table(result: Mapping[str, Any]) -> Table:
    case = result["case"]
    ranks = ", ".join(map(str, case["ranks"]))
    told = [row for row in result["rows"] if "refused" not in row]
    unit, size_of_unit = fitting_unit([size for row in told for size in row["up_bytes"].values()])
    attending = f"{case['asked']} of {case['clients']}" if case["asked"] < case["clients"] else str(case["clients"])
    title = (
        f"{to_printable(case['name'], 100)}: {attending} clients a round, rank {ranks}, {case['modules']} modules, "
        f"{case['values']:,} values. {unit} of one update + one broadcast; really encoded, of made-up updates"
    )
    table = Table(
        box=box.SIMPLE_HEAD,
        title=cell(title, "bold"),
        caption=_caption(case),
    )
    # On a narrow terminal sizes are broken at their sign before the name of any built-in method is broken.
    table.add_column("method", overflow="fold", min_width=9)
    for name in (PAPER, *CODINGS, "auto", "round", "of dense", "1 / Σ rank", "server CPU s", "MiB"):
        table.add_column(name, justify="right", overflow="fold")
    for row in result["rows"]:
        if "refused" in row:
            continue
        sizes = [
            f"{row['up_bytes'][c] / size_of_unit:.1f} + {row['down_bytes'][c] / size_of_unit:.1f}"
            for c in (PAPER, *CODINGS)
        ]
        table.add_row(
            cell(row["method"]),
            *sizes,
            row["auto"],
            human_bytes(row["total_bytes"]),
            f"{100 * row['share_of_dense']:.2f} %",
            _scientific(row["efficiency"]),
            f"{row['predicted_server_cpu_s']:.2f}",
            "–" if row["predicted_server_bytes"] is None else f"{row['predicted_server_bytes'] / MIB:,.0f}",
        )
    return table


def _caption(case: Mapping[str, Any]) -> str:
    """What the columns mean."""
    who, what = (
        ("of who is asked, with what they missed", "the whole run, its result delivered")
        if case["rounds"]
        else ("of all clients", "the round")
    )
    how = "server: measured, every layer" if case["whole"] else "server: predictions, from one layer played now"
    return (
        f"round: {who}, in the coding before it, wire.values. of dense: {what}, against "
        f"{human_bytes(case['dense_bytes'])} of dense fp32 FedIT of {case['dense_rank']} with the same attendance."
        f"{_data_words(case)} CPU seconds and memory of the {how}, {case['threads']} threads"
    )


def _data_words(case: Mapping[str, Any]) -> str:
    held = sum(case["data_bytes"].values())
    return f" The clients' own data: {human_bytes(held)} by {case['data_coding']}." if held else ""


def _refused_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Methods that do not take these clients", title_style="bold")
    table.add_column("method", overflow="fold")
    table.add_column("why")
    for row in rows:
        table.add_row(cell(row["method"]), cell(row["refused"]))
    return table


def _published_table(result: Mapping[str, Any]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Published figures: MiB of one client and round, or 1 / Σ rank",
        title_style="bold",
        caption="ours: really encoded; – where the estimate is of other ranks, modules or clients, or lacks the method",
    )
    numbers = ("published", "computed", "ours, its coding", "fp32", "int4")
    for name in ("paper", "rank", "method", "way", *numbers, "formula"):
        table.add_column(name, justify="right" if name in numbers else "left")
    for row in result["published"]:
        ours = row["ours"] or {}
        show = _scientific if row["way"] == "efficiency" else _mib
        table.add_row(
            row["paper"],
            f"{row['rank']}, K = {row['clients']}",
            row["method"],
            row["way"],
            show(row["published"]),
            show(row["computed"]),
            show(ours.get(PAPER, ours.get("efficiency"))),
            _mib(ours.get("fp32")),
            _mib(ours.get("int4")),
            row["formula"],
        )
    return table


def _mib(size: float | None) -> str:
    return "–" if size is None else f"{size:.1f}"


def _scientific(value: float | None) -> str:
    return "–" if value is None else f"{1e4 * value:.2f}e-4"
