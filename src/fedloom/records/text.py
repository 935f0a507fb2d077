"""Text that others wrote: names from data, errors of sites, keys of foreign files.

Such a text may hold escape sequences for a terminal, marks that turn the direction of writing, or a megabyte of
anything. `to_printable` is applied where it enters; `cell` where it is shown; `file_name` where it names a file.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

from rich.text import Text

LIMIT = 300
"""Characters of a foreign text at most; what a person reads of an error fits."""
LONG = 2000
"""Characters of our own sentences, which may quote several foreign texts."""
_NAME = 150
"""Characters of a file name that are taken from a foreign name; file systems allow 255 bytes in all."""
_MARKED = re.compile(r"~[0-9a-f]{16}\Z")


def to_printable(text: str, limit: int = LIMIT) -> str:
    r"""The text in one line of at most `limit` characters, control and format characters as \x1b, \n or \u202e.

    Applied twice it changes nothing more. Two texts may become the same: see `distinct_name`.
    """
    shown = text[: limit + 1]
    if not shown.isprintable():
        shown = "".join(map(_written, shown))
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def distinct_name(text: str, limit: int = LIMIT) -> str:
    """`to_printable` for a name. A digest follows where the name had to be changed, so that two names stay two."""
    return _marked(text, to_printable(text, limit))


def file_name(text: str) -> str:
    """A name for a file or folder: the text itself where it is harmless, otherwise its harmless part and a digest.

    Different texts get different names, on file systems that distinguish upper and lower case. A name is never hidden,
    empty, an option or a path, and has no character that Windows forbids, such as a colon.
    """
    kept = re.sub(r"""[^A-Za-z0-9 ._=,+@()\[\]{}'-]""", "_", text[:_NAME])
    return _marked(text, re.sub(r"\A[ .-]|\A\Z|[ .]\Z", "_", kept))


def cell(text: str, style: str = "", limit: int = LIMIT) -> Text:
    """A foreign text for rich, which would take a plain string for markup."""
    return Text(to_printable(text, limit), style=style)


def escape_json(text: str) -> str:
    r"""JSON that says the same in characters that a terminal and a pager show as they are; others become \u202e."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if _is_shown(char) or char == "\n" else _as_json(char) for char in text)


def _marked(text: str, shown: str) -> str:
    if shown == text and not _MARKED.search(text):
        return text
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{shown}~{digest}"


def _written(char: str) -> str:
    return char if _is_shown(char) else char.encode("unicode_escape").decode("ascii")


def _is_shown(char: str) -> bool:
    """Whether a character takes its own place on a line. Controls, formats, private use and half surrogates do not."""
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _as_json(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(rf"\u{units[start : start + 4]}" for start in range(0, len(units), 4))
