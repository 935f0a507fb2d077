"""An estimate for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fedloom.records.text import cell, to_printable
from fedloom.report.facts import human_seconds
from fedloom.report.numbers import human_bytes
from fedloom.studies.estimate.plan import name_lines
from fedloom.studies.estimate.published import MIB
from fedloom.studies.estimate.sizes import CODINGS, PAPER


def estimate_tables(result: Mapping[str, Any]) -> list[Table]:
    """What `run_estimate` returned, for a terminal."""
    refused = [row for row in result["rows"] if "refused" in row]
    planned = [row for row in result["rows"] if row.get("plan")]
    return [
        _round_table(result),
        *([_plan_table(planned)] if planned else []),
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
    note = f" {case['note']}." if case["note"] else ""
    return note + (f" The clients' own data: {human_bytes(held)} by {case['data_coding']}." if held else "")


def _plan_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Money, hours, and what server and sites need, for the whole run."""
    first = rows[0]["plan"]
    table = Table(box=box.SIMPLE_HEAD, title="The run as a plan", title_style="bold", caption=_plan_words(first))
    table.add_column("method", overflow="fold", min_width=9)
    heads = [
        "server sends",
        "sites send",
        *(["money"] if first["money"] is not None else []),
        *name_lines(first["lines"]),
    ]
    for name in (*heads, "server CPU", "server MiB", "site CPU", "site MiB"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        plan = row["plan"]
        table.add_row(
            cell(row["method"]),
            human_bytes(plan["server_sends_bytes"]),
            human_bytes(plan["sites_send_bytes"]),
            *([f"{plan['money']:,.4g}"] if plan["money"] is not None else []),
            *(human_seconds(line["run_seconds"]) for line in plan["lines"]),
            human_seconds(plan["server_cpu_s"]),
            "–" if plan["server_bytes"] is None else f"{plan['server_bytes'] / MIB:,.0f}",
            human_seconds(plan["site_cpu_s"]),
            f"{plan['site_bytes'] / MIB:,.0f}",
        )
    return table


def _plan_words(plan: Mapping[str, Any]) -> str:
    """What the columns mean."""
    base = "base model, " if plan["site_has_base"] else ""
    return (
        "lines: how long the whole run takes where every site has this line, up/down. server CPU: of all rounds; MiB: "
        f"at its peak. site CPU: of a turn beside its training; MiB: {base}adapter in training, payloads"
    )


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
