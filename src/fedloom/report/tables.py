"""The tables that close a run on the terminal."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from csv import DictWriter

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedloom.records.text import LONG, cell, to_printable
from fedloom.report.numbers import Report, common_rank, human_bytes
from fedloom.report.scores import score_rows, score_table, score_title

MOST_CLIENTS = 12
"""Clients that the closing table lists, the first and the last by name: as many as fit a small terminal."""
LAST_CLIENTS = 2
_SHORT = 20
"""Characters of a run's label up to which its column is not wrapped."""
_NARROW = 100
"""Columns of a terminal under which a longer label would leave its numbers no room: it takes several lines."""
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
"""First characters that make a spreadsheet compute a cell; the wide forms do so in some countries."""

_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
"""Characters that Markdown interprets. It shows an underscore within a word as it stands."""


def closing_tables(report: Report) -> RenderableType:
    """Score of each domain before and after; bytes of each client by turn and in all; the ratio to dense FedIT."""
    return Group(score_table(report), "", traffic_table(report), "", *_choice(report), cost_sentence(report), "")


def _choice(report: Report) -> list[str]:
    """Which round's model the run leaves, where that was chosen."""
    if report.exported is None:
        return []
    return [f"Ended after round {report.run.num_rounds}; adapter/ is the model after round {report.exported}."]


def traffic_table(report: Report) -> Table:
    """Payload bytes by client: the mean of a turn each way, the delivery of the result, and the whole run. Of many
    clients a few are listed.
    """
    table = Table(box=box.SIMPLE_HEAD, title="Bytes sent (payloads)", title_justify="left", title_style="bold")
    table.add_column("client")
    for name in ("turns", "up / turn", "down / turn", "delivery", "in all", "last loss"):
        table.add_column(name, justify="right")
    clients = list(report.totals.by_client.items())
    over = len(clients) - MOST_CLIENTS
    first = len(clients) if over <= 0 else MOST_CLIENTS - LAST_CLIENTS
    for place, (client, (up, down)) in enumerate(clients):
        if first <= place < len(clients) - LAST_CLIENTS:
            if place == first:
                table.add_row(f"… and {over} more in the report")
            continue
        losses = report.losses.get(client, [])
        turns = len(losses)
        given = report.delivered.get(client, 0)
        sizes = (_mean(up, turns), _mean(down - given, turns), human_bytes(given), human_bytes(up + down))
        table.add_row(cell(client), str(turns), *sizes, _last(losses))
    up, down = report.totals.bytes_up, report.totals.bytes_down
    given = sum(report.delivered.values())
    row = (_mean(up, report.turns), _mean(down - given, report.turns), human_bytes(given), human_bytes(up + down))
    table.add_row("all", str(report.turns), *row, "", style="bold")
    return table


def cost_sentence(report: Report) -> str:
    """The whole run against dense fp32 FedIT and against the clients' own data, in words."""
    sent, baseline = report.totals.bytes, report.baseline
    dense = baseline.bytes
    if not sent or not dense:
        return "Nothing was sent."
    everybody = " for all clients" if report.run.client_values else ""
    whole = (
        f"{human_bytes(sent)} in all: {100 * sent / dense:.1f} % of the {human_bytes(dense)} that {baseline.name}"
        f"{everybody} sends to and from the same clients in the same rounds ({dense / sent:.1f} × fewer)."
    )
    return " ".join(filter(None, (whole, data_sentence(report), region_sentence(report.totals.by_region))))


def region_sentence(regions: Mapping[str, Sequence[int]]) -> str:
    """What travelled between regional servers and the root, in words; "" where there are no regions.

    regions: region → bytes up and down.
    """
    if not regions:
        return ""
    up, down = (sum(sizes[way] for sizes in regions.values()) for way in (0, 1))
    return (
        f"Between {len(regions)} regional server{'s' * (len(regions) > 1)} and the root, {human_bytes(up)} went up and "
        f"{human_bytes(down)} down besides."
    )


def data_sentence(report: Report) -> str:
    """What was sent against the clients' own examples, compressed once; "" where their size is not known."""
    held = sum(report.run.data_bytes.values())
    if not held:
        return ""
    return (
        f"That is {_significant(report.totals.bytes / held)} times the clients' own data: {human_bytes(held)} by "
        f"{report.run.data_coding}, {human_bytes(held / len(report.run.data_bytes))} a client."
    )


def _significant(ratio: float) -> str:
    """Two digits at least."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def comparison_rows(groups: Mapping[str, Sequence[Report]]) -> list[dict[str, str]]:
    """Several runs, one row a label: scores (`score_rows`), bytes, seconds.

    All shares of bytes are of dense FedIT at one rank, which stands in the column's name.
    """
    costs = _costs(groups)
    return [{**scores, **cost} for scores, cost in zip(score_rows(groups), costs, strict=True)]


def _costs(groups: Mapping[str, Sequence[Report]]) -> list[dict[str, str]]:
    rank = common_rank([report for reports in groups.values() for report in reports])
    return [_compared(reports, rank) for reports in groups.values()]


def _compared(reports: Sequence[Report], rank: int | None) -> dict[str, str]:
    turns, rounds = sum(r.turns for r in reports), sum(r.run.num_rounds for r in reports)
    sent, dense = sum(r.totals.bytes for r in reports), sum(r.baseline_at(rank).bytes for r in reports)
    up, down = sum(r.totals.bytes_up for r in reports), sum(r.totals.bytes_down for r in reports)
    return {
        "up / turn": _mean(up, turns),
        "down / turn": _mean(down, turns),
        share_column(rank): f"{100 * sent / dense:.2f} %" if dense else "–",
        "s / turn": f"{sum(r.train_seconds for r in reports) / turns:.2f}" if turns else "–",
        "server s / round": f"{sum(r.server_seconds for r in reports) / rounds:.3f}",
    }


def comparison_tables(
    groups: Mapping[str, Sequence[Report]], split: str = "Held-out", width: int = 0
) -> RenderableType:
    """`comparison_rows` for a terminal, which is narrow: the scores first, then bytes and seconds.

    split: what the scores were taken on, as the title begins. width: columns of the terminal, 0 if not known.
    """
    runs, scores = [{"run": label} for label in groups], score_rows(groups)
    costs = [{**run, **cost} for run, cost in zip(runs, _costs(groups), strict=True)]
    title = score_title([report for reports in groups.values() for report in reports], split)
    return Group(comparison_table(scores, title, width), "", comparison_table(costs, "Bytes and seconds", width), "")


def share_column(rank: int | None) -> str:
    """The name of a column of shares of dense FedIT's bytes; None: each at its own rank."""
    return f"of dense fp32{'' if rank is None else f', rank {rank}'}"


def comparison_table(
    rows: Sequence[Mapping[str, str]], title: str = "Scores, bytes and seconds", width: int = 0
) -> Table:
    """Rows of texts that all have the same keys, for a terminal of `width` columns, 0 if that is not known."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold")
    for name in rows[0] if rows else ():
        # Numbers may wrap; a name broken in two is hard to find.
        limit = _SHORT if 0 < width < _NARROW else LONG
        labels = [break_label(row[name], limit) for row in rows] if name == "run" else []
        whole = bool(labels) and max(len(line) for lines in labels for line in lines) <= _SHORT
        table.add_column(cell(name), justify="left" if labels else "right", overflow="fold", no_wrap=whole)
    for row in rows:
        printable = {name: to_printable(text) for name, text in row.items()}
        shown = (break_label(text, limit) if name == "run" else [text] for name, text in printable.items())
        table.add_row(*(Text("\n").join(map(Text, lines)) for lines in shown))
    return table


def break_label(label: str, limit: int) -> list[str]:
    """The label in lines of at most `limit` characters, where signs such as "." and "=" allow it."""
    lines = [""]
    for part in re.findall(r"[^.:,=]*[.:,=]|[^.:,=]+", label):
        if lines[-1] and len(lines[-1]) + len(part) > limit:
            lines.append("")
        lines[-1] += part
    return lines


def to_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows of `comparison_rows` as a Markdown table."""
    if not rows:
        return ""
    head, *cells = [[_in_markdown(text) for text in line] for line in (rows[0], *(row.values() for row in rows))]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _in_markdown(text: str) -> str:
    """A cell that shows the text, in every reader of Markdown: no markup, no HTML, no end of the cell or the row."""
    return re.sub(_MARKUP, r"\\\g<0>", html.escape(to_printable(text), quote=False))


def to_csv(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as comma-separated values. What a spreadsheet would compute begins with an apostrophe."""
    text = io.StringIO()
    if rows:
        writer = DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({head: _in_spreadsheet(value) for head, value in row.items()} for row in rows)
    return text.getvalue()


def _in_spreadsheet(text: str) -> str:
    shown = to_printable(text)
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) and not _is_number(shown) else shown


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", text, re.ASCII) is not None


def _mean(size: int, turns: int) -> str:
    return human_bytes(size / turns) if turns else "–"


def _last(losses: Sequence[float]) -> str:
    # NaN where a site keeps its loss to itself.
    return f"{losses[-1]:.3f}" if losses and not math.isnan(losses[-1]) else "–"
