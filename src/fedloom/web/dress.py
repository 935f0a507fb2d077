"""What the server puts around a page: links between runs, what a browser may run of it, a page to wait on."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable
from functools import cache
from urllib.parse import quote

from fedloom.records.text import LONG, to_printable
from fedloom.report.page import Page, write_html

MOST_LINKS = 200
_STYLE = """
.runs { display: flex; flex-wrap: wrap; gap: .25rem 1rem; max-width: 70rem; margin: 0 auto; padding: .75rem 1rem 0;
  font: 0.9rem/1.5 system-ui, sans-serif; }
.runs a { overflow-wrap: anywhere; color: inherit; } .runs a[aria-current] { font-weight: 700; text-decoration: none; }
.waiting { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 20vh auto; padding: 0 1rem;
  overflow-wrap: anywhere; }
@media print { .runs { display: none; } }
"""
_DARK = ":root { color-scheme: light dark; }"
_SCRIPT = re.compile(r"<script(?![^>]*application/json)[^>]*>(.*?)</script>", re.DOTALL)
_STYLED = re.compile(r"<style[^>]*>(.*?)</style>", re.DOTALL)


def add_links(page: str, names: Iterable[str], current: str) -> str:
    """The page with links to all runs side by side and to each; as it was where there is one run alone.

    current: the run that it shows, "" for all.
    """
    listed = list(names)
    if len(listed) < 2:
        return page
    shown = [("/", "all runs", ""), *((f"/run/{quote(name)}/", name, name) for name in listed[:MOST_LINKS])]
    links = [
        f'<a href="{html.escape(url)}"{" aria-current=page" if name == current else ""}>'
        f"{html.escape(to_printable(words, LONG))}</a>"
        for url, words, name in shown
    ]
    more = [f"<span>and {len(listed) - MOST_LINKS} more</span>"] if len(listed) > MOST_LINKS else []
    nav = f'<style>{_STYLE}</style>\n<nav class="runs" aria-label="Runs">\n{chr(10).join(links + more)}\n</nav>\n'
    head, body, rest = page.partition("<body>")
    return f"{head}{body}\n{nav}{rest}"


def waiting_page(reason: str) -> str:
    """A page that says why there is nothing to see yet, and looks again."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="refresh" content="2">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>fedloom</title>\n<style>{_DARK}</style>\n'
        f'<style>{_STYLE}</style>\n</head>\n<body>\n<p class="waiting" role="status">'
        f"{html.escape(to_printable(reason, LONG))}</p>\n</body>\n</html>\n"
    )


@cache
def page_policy() -> str:
    """The Content-Security-Policy of a page: it runs the scripts of an empty page, and loads from this server alone.

    The hashes are those of a page with nothing in it, so that no text of a run can be taken for a script of ours.
    """
    empty = write_html(Page("", "over", "0", ()), live=True)
    scripts = " ".join(map(_hash, _SCRIPT.findall(empty)))
    styles = " ".join(map(_hash, [*_STYLED.findall(empty), _STYLE, _DARK]))
    return (
        f"default-src 'none'; script-src {scripts or chr(39) + 'none' + chr(39)}; style-src {styles}; "
        "style-src-attr 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
