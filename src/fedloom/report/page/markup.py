"""A page as HTML, and what a live page asks for.

Everything that a run brings along, names, errors, settings, is escaped here and nowhere else. The page's policy allows
the scripts of the package alone, by their digests, and no network: what slipped through would not be run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources

from fedloom.records.text import LONG, to_printable
from fedloom.report.page.charts import Chart
from fedloom.report.page.model import Block, Headline, Page, Section, Table, Words
from fedloom.report.page.values import MOST_ROWS, chart_table

_LINES = 20
"""Lines of a cell: the first of many."""


def write_html(page: Page, *, live: bool = False) -> str:
    """The whole page in one text.

    live: it asks for data.json beside it again and again, more rarely once the runs are over.
    """
    scripts = [read_asset("theme.js"), read_asset("echarts.min.js"), read_asset("page.js")]
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    fills = {
        "policy": f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src '{'self' if live else 'none'}'; base-uri 'none'; form-action 'none'",
        "title": _shown(page.title),
        "style": read_asset("page.css"),
        "theme": scripts[0],
        "main": _main(page),
        "data": _in_script(_data(page, live)),
        "echarts": scripts[1],
        "script": scripts[2],
    }
    parts = read_asset("page.html").split("{{")
    return parts[0] + "".join(fills[name] + rest for name, _, rest in (part.partition("}}") for part in parts[1:]))


def write_update(page: Page) -> str:
    """What data.json answers: JSON with the keys version, state, title, main (the page's HTML) and charts."""
    told = {**_data(page, True), "title": page.title, "main": _main(page)}
    return json.dumps(told, ensure_ascii=False, separators=(",", ":"))


@cache
def read_asset(name: str) -> str:
    """A file of this folder's assets."""
    return resources.files("fedloom.report.page").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data(page: Page, live: bool) -> dict[str, object]:
    return {"version": page.version, "state": page.state, "live": live, "charts": [asdict(c) for c in page.charts]}


def _in_script(data: object) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _shown(text: str) -> str:
    """A text of others as HTML that shows it."""
    return html.escape(to_printable(text, LONG))


def _lines(text: str) -> str:
    """A text of others in its own lines, the first of many."""
    return "\n".join(_shown(line) for line in text.split("\n")[:_LINES])


def _main(page: Page) -> str:
    """The whole of the page's body: head, contents, sections. What changes while a run goes on has a data-part."""
    sections = [section for section in page.sections if section.title]
    links = "".join(f'<li><a href="#{_shown(s.id)}">{_shown(s.title)}</a></li>' for s in sections)
    mark = "running" if page.state == "running" else "over"
    status = f'<p class="status {mark}" data-part="status">{_shown(page.status)}</p>' if page.status else ""
    return "\n".join(
        (
            f'<header class="head"><h1 data-part="heading">{_shown(page.heading or page.title)}</h1>',
            f'<p class="subtitle" data-part="subtitle">{_shown(page.subtitle)}</p>{status}</header>',
            f'<dl class="headlines" data-part="headlines">{"".join(map(_headline, page.headlines))}</dl>',
            f'<nav class="contents" aria-label="Contents"><ul>{links}</ul></nav>',
            *map(_section, page.sections),
        )
    )


def _headline(one: Headline) -> str:
    more = f'<dd class="more">{_shown(one.more)}</dd>' if one.more else ""
    return f'<div><dt>{_shown(one.what)}</dt><dd class="value">{_shown(one.value)}</dd>{more}</div>'


def _section(section: Section) -> str:
    """Charts that follow each other stand in a grid."""
    lead = f'<p class="lead" data-part="{_shown(section.id)}-lead">{_shown(section.lead)}</p>' if section.lead else ""
    parts, charts = list[str](), list[str]()
    for block in [*section.blocks, None]:
        if isinstance(block, Chart):
            charts.append(_chart(block))
            continue
        if charts:
            parts.append(f'<div class="charts">{"".join(charts)}</div>')
            charts = []
        if block is not None:
            parts.append(_block(block))
    title = f"<h2>{_shown(section.title)}</h2>" if section.title else ""
    return f'<section id="{_shown(section.id)}">{title}{lead}\n{chr(10).join(parts)}\n</section>'


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table_block(block)
    assert isinstance(block, Words)
    ident = _shown(block.id)
    if not block.code:
        kind = ' class="alarm" role="alert"' if block.alarm else ""
        return f'<p{kind} id="{ident}" data-part="{ident}">{_shown(block.text)}</p>'
    lines = "\n".join(map(_shown, block.text.split("\n")))
    body = f'<div class="code"><pre tabindex="0" data-part="{ident}">{lines}</pre></div>'
    if block.folded:
        return f'<details id="{ident}"><summary>{_shown(block.title)}</summary>{body}</details>'
    return f'<div id="{ident}"><h3>{_shown(block.title)}</h3>{body}</div>'


def _chart(chart: Chart) -> str:
    """Its title, the place where a script draws it, and its values as a table."""
    ident, title = _shown(chart.id), _shown(chart.title)
    head, rows = chart_table(chart)
    note = f'<p class="note" data-part="{ident}-note">{_shown(chart.note)}</p>' if chart.note else ""
    wide = " wide" if chart.kind == "heat" and len(chart.x.names) > 12 or chart.kind == "dots" else ""
    more = f"<p class='note'>{MOST_ROWS} rows at even distances; the CSV has all.</p>" if len(rows) == MOST_ROWS else ""
    return (
        f'<figure class="chart{wide}" id="{ident}">'
        f"<figcaption><h3>{title}</h3></figcaption>"
        f'<div class="plot" data-chart="{ident}" tabindex="0" role="img" aria-label="{title}; the values stand in the '
        f'table below. Arrow keys read them one by one, + and - zoom, 0 shows all."></div>{note}'
        f'<div class="below"><details class="values"><summary>Values</summary>'
        f'<div data-part="{ident}-values">{_table(head, rows, caption=chart.title)}{more}</div></details></div>'
        "</figure>"
    )


def _table_block(block: Table) -> str:
    ident = _shown(block.id)
    note = f'<p class="note">{_shown(block.note)}</p>' if block.note else ""
    body = (
        f'<div data-part="{ident}">{_table(block.head, block.rows, block.title, block.total, block.words)}{note}</div>'
    )
    if block.folded:
        return f'<details id="{ident}"><summary>{_shown(block.title)}</summary>{body}</details>'
    return f'<div class="block" id="{ident}"><h3>{_shown(block.title)}</h3>{body}</div>'


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    total: bool = False,
    words: bool = False,
) -> str:
    """A table; `total`: its last row sums the others up; `words`: its cells are texts."""
    if not rows:
        return "<p>Nothing recorded.</p>"
    shown, last = _lines if words else _shown, len(rows) - 1
    lines = [f'<caption class="unseen">{_shown(caption)}</caption>'] if caption else []
    if any(head):
        lines.append(f"<thead><tr>{''.join(f'<th scope=col>{_shown(cell)}</th>' for cell in head)}</tr></thead>")
    lines.append("<tbody>")
    for number, row in enumerate(rows):
        mark = " class=total" if total and number == last else ""
        first, *others = row
        cells = "".join(f"<td>{shown(cell)}</td>" for cell in others)
        lines.append(f"<tr{mark}><th scope=row>{shown(first)}</th>{cells}</tr>")
    kind = ' class="words"' if words else ""
    label = f' role="region" aria-label="{_shown(caption)}"' if caption else ""
    return f'<div class="scroll" tabindex="0"{label}><table{kind}>\n{chr(10).join(lines)}\n</tbody></table></div>'
