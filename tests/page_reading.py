"""A page of runs made from rows, and read as a browser would: what is code in it, and what is text."""

from __future__ import annotations

from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

from fedloom.records.ledger import Row
from fedloom.report import summarise
from fedloom.report.page import page_of, write_html


def page_text(rows: Iterable[Row], folder: Path = Path("runs/x")) -> str:
    """The page of a run of these rows."""
    held = list(rows)
    return write_html(page_of(folder, summarise(held), held))


class Reading(HTMLParser):
    """tags, keys (of attributes), links; text: what a person reads; scripts: by what their element says they are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.keys: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.scripts: list[tuple[str, str]] = []
        self._within = ""
        self._kind = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.keys |= {key for key, _ in attributes}
        self.links += [value or "" for key, value in attributes if key in ("src", "href") or key.endswith(":href")]
        if tag in ("script", "style"):
            self._within, self._kind = tag, dict(attributes).get("type") or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == self._within:
            self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            self.scripts.append((self._kind, data))
        elif not self._within:
            self.text += data
