"""One self-contained HTML page about a run: no script, no network, the picture inline."""

from __future__ import annotations

import html
from collections.abc import Sequence

from fedloom.records.text import LONG, to_printable
from fedloom.report.figure import draw_svg
from fedloom.report.numbers import MEAN, Report, human_bytes
from fedloom.report.tables import cost_sentence

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.facts { color: #555; margin-top: .2rem; } p.sum { font-size: 1.1rem; }
svg { width: 100%; height: auto; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; } tr:last-child.total td { font-weight: 600; }
"""


def _shown(text: str) -> str:
    """A text of others as HTML that shows it."""
    return html.escape(to_printable(text, LONG))


def page(report: Report) -> str:
    """The page as text."""
    run = report.run
    facts = (
        f"{run.num_rounds} rounds, {len(run.clients)} clients, seed {run.seed}, {run.adapter_values:,} adapter values, "
        f"base model {run.model}"
    )
    if run.data_bytes:
        facts += f", the clients' own data {human_bytes(sum(run.data_bytes.values()))} by {run.data_coding}"
    sections = [
        f"<h1>fedloom run: {_shown(run.method)}</h1>",
        f'<p class="facts">{_shown(facts)}</p>',
        f'<p class="sum">{_shown(cost_sentence(report))}</p>',
        draw_svg(report) if report.points else "",
        "<h2>Held-out exact match (%)</h2>",
        _table(("domain", "before", "after", "change"), _scores(report), total=True),
        "<h2>Bytes sent, by client</h2>",
        _table(("client", "turns", "up", "down", "delivery", "in all"), _clients(report), total=True),
        "<h2>Bytes sent, by part of the payload</h2>",
        _table(("part", "bytes"), [(part, human_bytes(size)) for part, size in report.totals.by_part.items()]),
        "<h2>Bytes sent, by round</h2>",
        _table(("round", "up", "down", "mean score (%)"), _rounds(report)),
    ]
    if report.notes:
        sections.append("<h2>Notes</h2>")
        sections.append(_table(("round", "what happened"), [(str(note.round), note.text) for note in report.notes]))
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>fedloom run: {_shown(run.method)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _scores(report: Report) -> list[tuple[str, ...]]:
    names = [*report.domains, MEAN] if report.points else []
    pairs = [(name, 100 * report.score(name, 0), 100 * report.score(name)) for name in names]
    return [(name, f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}") for name, before, after in pairs]


def _clients(report: Report) -> list[tuple[str, ...]]:
    sums = report.totals
    lines = [
        (client, len(report.losses.get(client, [])), up, down, report.delivered.get(client, 0))
        for client, (up, down) in sums.by_client.items()
    ]
    lines.append(("all", report.turns, sums.bytes_up, sums.bytes_down, sum(report.delivered.values())))
    return [
        (client, str(turns), human_bytes(up), human_bytes(down - given), human_bytes(given), human_bytes(up + down))
        for client, turns, up, down, given in lines
    ]


def _rounds(report: Report) -> list[tuple[str, ...]]:
    scores = {point.round: f"{100 * point.scores[MEAN]:.1f}" for point in report.points}
    return [
        (str(round), human_bytes(up), human_bytes(down), scores.get(round, "–"))
        for round, (up, down) in report.totals.by_round.items()
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False) -> str:
    if not rows:
        return "<p>Nothing recorded.</p>"
    last = len(rows) - 1
    lines = [f"<tr>{''.join(f'<th>{_shown(cell)}</th>' for cell in head)}</tr>"]
    for number, row in enumerate(rows):
        mark = ' class="total"' if total and number == last else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{_shown(cell)}</td>' for cell in row)}</tr>")
    return f'<div class="scroll"><table>\n{chr(10).join(lines)}\n</table></div>'
