"""One self-contained HTML page about a run: no script, no network, the picture inline."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from fedloom.records.text import LONG, to_printable
from fedloom.report.facts import LINES, describe_circumstances, human_seconds
from fedloom.report.figure import draw_svg
from fedloom.report.measures import TRAINING_LOSS, list_measures
from fedloom.report.numbers import MEAN, Report, human_bytes
from fedloom.report.sampling import MOST, sample, say_sampled
from fedloom.report.scores import NO_SCORE, score_cells, score_head
from fedloom.report.tables import cost_sentence

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.facts { color: #555; margin-top: .2rem; } p.sum { font-size: 1.1rem; }
svg { width: 100%; height: auto; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child, .words th, .words td { text-align: left; vertical-align: top; }
.words td { white-space: pre-wrap; overflow-wrap: anywhere; } .words td:first-child { white-space: nowrap; }
p.failed { background: #fdecea; border-left: .3rem solid #b3261e; padding: .5rem 1rem; }
details { margin-top: 2rem; } summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem; }
tr:last-child.total td { font-weight: 600; }
"""


def _shown(text: str) -> str:
    """A text of others as HTML that shows it."""
    return html.escape(to_printable(text, LONG))


def _shown_lines(text: str) -> str:
    """A text of others in its own lines, the first of many."""
    return "\n".join(_shown(line) for line in text.split("\n")[:20])


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
        _failure(report),
        f'<p class="sum">{_shown(cost_sentence(report))}</p>',
        draw_svg(report) if report.points or report.training else "",
        _said(say_sampled("points of a line", max(len(report.points), 0 if report.points else len(report.training)))),
        "<h2>Held-out scores, before → after</h2>",
        _score_section(report),
        "<h2>Bytes sent, by client</h2>",
        _table(("client", "examples", "turns", "up", "down", "delivery", "in all"), _clients(report), total=True),
        _said(say_sampled("clients", len(report.totals.by_client), "by name")),
        *_durations(report),
        "<h2>Bytes sent, by part of the payload</h2>",
        _table(("part", "bytes"), [(part, human_bytes(size)) for part, size in report.totals.by_part.items()]),
        "<h2>Bytes sent, by round</h2>",
        _rounds(report),
        _said(say_sampled("rounds", len(report.totals.by_round))),
    ]
    sections += _answers(report)
    if report.notes:
        happened = [(str(note.round), note.text) for note in report.notes[-MOST:]]
        more = _said(say_sampled("notes", len(report.notes), "the newest"))
        sections += ["<h2>Notes</h2>", _table(("round", "what happened"), happened, words=True), more]
    sections += _circumstances(report)
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>fedloom run: {_shown(run.method)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _said(text: str) -> str:
    return f"<p>{_shown(text)}</p>" if text else ""


def _score_section(report: Report) -> str:
    """Every measure by domain."""
    measures = list_measures([report])
    rows = [(domain, *score_cells(report, measures, domain)) for domain in [*report.domains, MEAN]] if measures else []
    if not rows:
        return f"<p>{_shown(NO_SCORE)}</p>"
    return _table(("domain", *score_head(measures)), rows, total=True)


def _clients(report: Report) -> list[tuple[str, ...]]:
    examples, sums = report.facts.examples, report.totals
    lines = [
        (client, examples.get(client, 0), len(report.losses.get(client, [])), up, down, report.delivered.get(client, 0))
        for client, (up, down) in list(sums.by_client.items())[:MOST]
    ]
    given = sum(report.delivered.values())
    lines.append(("all", sum(examples.values()), report.turns, sums.bytes_up, sums.bytes_down, given))
    return [
        (
            client,
            f"{held:,}" if held else "–",
            str(turns),
            *(human_bytes(size) for size in (up, down - given, given, up + down)),
        )
        for client, held, turns, up, down, given in lines
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
        for round, (up, down) in sample(list(report.totals.by_round.items()))
    ]
    return _table(("round", "up", "down", *(measure.title for measure in measures)), rows)


def _failure(report: Report) -> str:
    """In one loud paragraph, that the run came to nothing and why."""
    end = report.facts.end
    return f'<p class="failed">This run failed: {_shown(end.reason)}</p>' if end and end.status == "failed" else ""


def _durations(report: Report) -> list[str]:
    """What the bytes mean on a line, in time: of one turn on the mean, and of the whole run of the busiest client."""
    turns, clients = report.turns, report.totals.by_client
    if not turns or not clients:
        return []
    most = max(up + down for up, down in clients.values())
    sizes = (report.totals.bytes_up / turns, report.totals.bytes_down / turns, most)
    rows = [(line, *(human_seconds(8 * size / speed) for size in sizes)) for line, speed in LINES.items()]
    head = ("a line of", "up, a turn", "down, a turn", "a client's whole run, at most")
    return ["<h2>Time that the bytes take</h2>", _table(head, rows), "<p>Payloads alone, at the full speed.</p>"]


def _answers(report: Report) -> list[str]:
    """Held-out examples that the model was asked before the first and after the last round."""
    rows = [
        (domain, prompt, expected, by_round[min(by_round)], by_round[max(by_round)])
        for (domain, prompt), (expected, by_round) in report.facts.answers.items()
    ]
    head = ("domain", "prompt", "expected", "before", "after")
    return ["<h2>Answers to held-out examples</h2>", _table(head, rows, words=True)] if rows else []


def _circumstances(report: Report) -> list[str]:
    """When, where, how long, with what; and all settings, folded up."""
    facts = report.facts
    known = describe_circumstances(facts)
    found = ["<h2>Circumstances</h2>", _table(("", ""), known, words=True)] if known else []
    if facts.sessions:
        lines = "\n".join(_shown(line) for line in facts.sessions[-1].settings.splitlines())
        found.append(f"<details>\n<summary>Settings</summary>\n<pre>{lines}</pre>\n</details>")
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False, words: bool = False) -> str:
    """A table; `total`: its last row sums the others up; `words`: its cells are texts."""
    if not rows:
        return "<p>Nothing recorded.</p>"
    shown, last = _shown_lines if words else _shown, len(rows) - 1
    lines = [f"<tr>{''.join(f'<th>{_shown(cell)}</th>' for cell in head)}</tr>"] if any(head) else []
    for number, row in enumerate(rows):
        mark = ' class="total"' if total and number == last else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{shown(cell)}</td>' for cell in row)}</tr>")
    kind = ' class="words"' if words else ""
    return f'<div class="scroll"><table{kind}>\n{chr(10).join(lines)}\n</table></div>'
