"""The tables that close a run on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from fedloom.report.numbers import MEAN, Report, human_bytes, interval


def closing(report: Report) -> RenderableType:
    """Score of each domain before and after; bytes of each client by turn and in all; the ratio to dense FedIT."""
    return Group(scores(report), "", traffic(report), "", sentence(report), "")


def scores(report: Report) -> Table:
    """Held-out exact match by domain, in percent."""
    table = Table(box=box.SIMPLE_HEAD, title="Held-out exact match (%)", title_justify="left", title_style="bold")
    table.add_column("domain")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for domain in [*report.domains, MEAN] if report.points else []:
        before, after = 100 * report.score(domain, 0), 100 * report.score(domain)
        style = "bold" if domain == MEAN else ""
        table.add_row(domain, f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}", style=style)
    return table


def traffic(report: Report) -> Table:
    """Payload bytes by client: the mean of a turn each way, and the whole run."""
    table = Table(box=box.SIMPLE_HEAD, title="Bytes sent (payloads)", title_justify="left", title_style="bold")
    table.add_column("client")
    for name in ("turns", "up / turn", "down / turn", "in all", "last loss"):
        table.add_column(name, justify="right")
    for client, (up, down) in report.totals.by_client.items():
        losses = report.losses.get(client, [])
        turns = len(losses)
        table.add_row(client, str(turns), _mean(up, turns), _mean(down, turns), human_bytes(up + down), _last(losses))
    up, down = report.totals.bytes_up, report.totals.bytes_down
    row = (_mean(up, report.turns), _mean(down, report.turns), human_bytes(up + down))
    table.add_row("all", str(report.turns), *row, "", style="bold")
    return table


def sentence(report: Report) -> str:
    """The whole run against dense fp32 FedIT, in words."""
    sent, dense = report.totals.bytes, report.dense_bytes
    if not sent or not dense:
        return "Nothing was sent."
    return (
        f"{human_bytes(sent)} in all: {100 * sent / dense:.1f} % of the {human_bytes(dense)} that dense fp32 FedIT "
        f"sends in as many turns ({dense / sent:.1f} × fewer)."
    )


def comparison(groups: Mapping[str, Sequence[Report]]) -> Table:
    """Several runs, one row a label: mean final score over seeds and its 95 % interval, bytes, seconds."""
    table = Table(box=box.SIMPLE_HEAD, title="Held-out exact match after the last round", title_style="bold")
    table.add_column("run", no_wrap=True)
    for name in ("seeds", "score (%)", "interval", "sent", "of dense", "s / turn", "server s / round"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, reports in groups.items():
        mean, half = interval([100 * report.score(MEAN) for report in reports])
        sent, dense = (sum(sizes) for sizes in zip(*((r.totals.bytes, r.dense_bytes) for r in reports), strict=True))
        turns, rounds = sum(r.turns for r in reports), sum(r.run.num_rounds for r in reports)
        table.add_row(
            label,
            str(len(reports)),
            f"{mean:.1f}",
            f"± {half:.1f}" if len(reports) > 1 else "–",
            human_bytes(sent / len(reports)),
            f"{100 * sent / dense:.1f} %" if dense else "–",
            f"{sum(r.train_seconds for r in reports) / turns:.2f}" if turns else "–",
            f"{sum(r.server_seconds for r in reports) / rounds:.3f}",
        )
    return table


def _mean(size: int, turns: int) -> str:
    return human_bytes(size / turns) if turns else "–"


def _last(losses: Sequence[float]) -> str:
    return f"{losses[-1]:.3f}" if losses else "–"
