"""How the worker's log is written: one line a message, whatever text of strangers is in it."""

from __future__ import annotations

import logging
import traceback
import unicodedata
from typing import Any

MOST_LOGGED = 8000
"""Characters of an error and of its traceback in the log: their texts may be the server's."""


class OneLine(logging.Formatter):
    """Log lines in which foreign text cannot pose as another line, or steer the terminal that shows them.

    Control and format characters are written as in Python's source, and the lines of a traceback begin with a bar.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: ANN401 (logging's own type)
        return "\n".join(f"  | {_printable(line)}" for line in super().formatException(ei).split("\n"))


def _printable(text: str) -> str:
    """The text with control characters, format characters and the like (Unicode's C*, Zl, Zp) as escapes."""
    return "".join(
        character.encode("unicode_escape").decode() if _steers(unicodedata.category(character)) else character
        for character in text
    )


def _steers(category: str) -> bool:
    return category.startswith("C") or category in ("Zl", "Zp")


def quote_trace(error: Exception) -> str:
    """The traceback, each line marked and without control characters: it may hold text of the server's."""
    lines = "".join(traceback.format_exception(error))[-MOST_LOGGED:].splitlines()
    return "".join(f"\n  | {line.encode('unicode_escape').decode()}" for line in lines)
