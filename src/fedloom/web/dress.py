"""What the server puts around a page: links between runs, what a browser may run of it, pages of a few words."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from urllib.parse import quote

from fedloom.records.text import LONG, to_printable
from fedloom.report.page import Page, write_html, write_update

MOST_LINKS = 200
"""Runs that are linked: more than anybody reads, and few enough for a phone."""
_STYLE = """
.runs { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin-top: 1rem; font-size: .9rem; }
.runs a { color: var(--soft); overflow-wrap: anywhere; }
.runs a[aria-current] { color: var(--ink); font-weight: 620; text-decoration: none; }
@media print { .runs { display: none; } }
"""
_PLAIN = """
:root { color-scheme: light dark; font: 1.05rem/1.6 system-ui, sans-serif; }
body { max-width: 40rem; margin: 15vh auto; padding: 0 1rem; overflow-wrap: anywhere; }
"""
_SCRIPT = re.compile(r"<script(?![^>]*application/json)[^>]*>(.*?)</script>", re.DOTALL)
_STYLED = re.compile(r"<style[^>]*>(.*?)</style>", re.DOTALL)


class Dressed:
    """A page with links to all runs side by side and to each; as it is where there is one run alone.

    current: the run that it shows, "" for all. version: changes with the page, and with the runs that there are.
    """

    def __init__(self, page: Page, names: Iterable[str], current: str) -> None:
        listed = list(names)
        self._links = _links(listed, current) if len(listed) > 1 else ""
        known = hashlib.sha256(self._links.encode()).hexdigest()[:8]
        self.page = replace(page, version=f"{page.version}-{known}") if self._links else page

    @property
    def version(self) -> str:
        """The same as long as the page is."""
        return self.page.version

    def html(self) -> str:
        """The whole page, live."""
        text = write_html(self.page, live=True)
        if self._links:
            text = text.replace("</head>", f"<style>{_STYLE}</style>\n</head>", 1)
            text = text.replace('<main id="main">', f'<main id="main">{self._links}', 1)
        return text

    def update(self) -> str:
        """What the live page asks for."""
        told = write_update(self.page)
        if not self._links:
            return told
        held = json.loads(told)
        return json.dumps({**held, "main": self._links + held["main"]}, ensure_ascii=False, separators=(",", ":"))


def _links(names: Sequence[str], current: str) -> str:
    shown = [("/", "all runs", ""), *((f"/run/{quote(name)}/", name, name) for name in names[:MOST_LINKS])]
    links = [
        f'<a href="{html.escape(url)}"{" aria-current=page" if name == current else ""}>'
        f"{html.escape(to_printable(words, LONG))}</a>"
        for url, words, name in shown
    ]
    more = [f"<span>and {len(names) - MOST_LINKS} more</span>"] if len(names) > MOST_LINKS else []
    return f'<nav class="runs" aria-label="Runs" data-part="served-runs">{" ".join(links + more)}</nav>'


def plain_page(body: str, *, again: bool = False) -> str:
    """A page of a few words, given as HTML. again: it is loaded anew every other second."""
    refresh = '<meta http-equiv="refresh" content="2">\n' if again else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{refresh}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>fedloom</title>\n<style>{_PLAIN}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def waiting_page(reason: str) -> str:
    """A page that says why there is nothing to see yet, and looks again."""
    return plain_page(f'<p role="status">{html.escape(to_printable(reason, LONG))}</p>', again=True)


def figures_page(names: Iterable[tuple[str, str]], kinds: Sequence[str]) -> str:
    """A list of the files of figures. names: (its name, its title)."""
    lines = []
    for name, title in names:
        links = ", ".join(f'<a href="{html.escape(quote(name))}.{kind}">{kind}</a>' for kind in kinds)
        lines.append(f"<li>{html.escape(to_printable(title, LONG))}: {links}</li>")
    return plain_page(f'<p><a href="../">The page</a></p>\n<ul>\n{chr(10).join(lines)}\n</ul>')


@cache
def page_policy() -> str:
    """The Content-Security-Policy of a page: it runs the scripts of an empty page, and loads from this server alone.

    The hashes are those of a page with nothing in it, so that no text of a run can be taken for a script of ours.
    """
    empty = write_html(Page("", "over", "0", ()), live=True)
    scripts = " ".join(map(_hash, _SCRIPT.findall(empty)))
    styles = " ".join(map(_hash, [*_STYLED.findall(empty), _STYLE, _PLAIN]))
    return (
        # Charts set the style of single elements; no text of a run is ever in such an attribute.
        f"default-src 'none'; script-src {scripts}; style-src {styles}; style-src-attr 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
