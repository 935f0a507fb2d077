"""One self-contained HTML page about a run: no script, no network, the picture inline."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from fedloom.records.text import LONG, to_printable
from fedloom.report.figure import draw_svg
from fedloom.report.measures import TRAINING_LOSS, list_measures
from fedloom.report.numbers import MEAN, Report, human_bytes
from fedloom.report.scores import NO_SCORE, score_cells, score_head, worse_sentence
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
p.worse { color: #9a3412; }
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
    sections = [
        f"<h1>fedloom run: {_shown(run.method)}</h1>",
        f'<p class="facts">{_shown(facts)}</p>',
        f'<p class="sum">{_shown(cost_sentence(report))}</p>',
        draw_svg(report) if report.points or report.training else "",
        "<h2>Held-out scores, before → after</h2>",
        _score_section(report),
        "<h2>Bytes sent, by client</h2>",
        _table(("client", "turns", "up", "down", "in all"), _clients(report), total=True),
        "<h2>Bytes sent, by part of the payload</h2>",
        _table(("part", "bytes"), [(part, human_bytes(size)) for part, size in report.totals.by_part.items()]),
        "<h2>Bytes sent, by round</h2>",
        _rounds(report),
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


def _score_section(report: Report) -> str:
    """Every measure by domain; what to say of a run that ended worse stands below."""
    measures, worse = list_measures([report]), worse_sentence(report)
    rows = [(domain, *score_cells(report, measures, domain)) for domain in [*report.domains, MEAN]] if measures else []
    if not rows:
        return f"<p>{_shown(NO_SCORE)}</p>"
    table = _table(("domain", *score_head(measures)), rows, total=True)
    return f'{table}\n<p class="worse">{_shown(worse)}</p>' if worse else table


def _clients(report: Report) -> list[tuple[str, ...]]:
    rows = [
        (client, str(len(report.losses.get(client, []))), human_bytes(up), human_bytes(down), human_bytes(up + down))
        for client, (up, down) in report.totals.by_client.items()
    ]
    sums = report.totals
    return [
        *rows,
        ("all", str(report.turns), *(human_bytes(size) for size in (sums.bytes_up, sums.bytes_down, sums.bytes))),
    ]


def _rounds(report: Report) -> str:
    """Bytes by round, beside them the mean of every measure, or the training loss where nothing was held out."""
    measures = list_measures([report]) or [TRAINING_LOSS]
    points = {point.round: point for point in (report.points or report.training)}
    rows = [
        (
            str(round),
            human_bytes(up),
            human_bytes(down),
            *(
                m.show(points[round].values.get(m.key, {}).get(MEAN, math.nan)) if round in points else "–"
                for m in measures
            ),
        )
        for round, (up, down) in report.totals.by_round.items()
    ]
    return _table(("round", "up", "down", *(measure.title for measure in measures)), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False) -> str:
    if not rows:
        return "<p>Nothing recorded.</p>"
    last = len(rows) - 1
    lines = [f"<tr>{''.join(f'<th>{_shown(cell)}</th>' for cell in head)}</tr>"]
    for number, row in enumerate(rows):
        mark = ' class="total"' if total and number == last else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{_shown(cell)}</td>' for cell in row)}</tr>")
    return f'<div class="scroll"><table>\n{chr(10).join(lines)}\n</table></div>'
