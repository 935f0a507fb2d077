"""The server's log: every row of the ledger as it happens, with the time and a level, one JSON object a line.

Log shippers read it as it is. Unlike the ledger it is never cut back: rounds that a crash undid stay in it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from fedloom.records.ledger import Note, Presence, Roll, Row, dump_row
from fedloom.records.session import End
from fedloom.records.text import escape_json

FILE = "log.jsonl"
"""Its name in a run's folder."""


class ServerLog:
    """Appends to the file at `path`; a full disk or a lost file does not stop a run."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def row(self, row: Row, line: bytes = b"") -> None:
        """One line: {"time", "level", "event", …}, the event being the kind of row. line: the row in a ledger."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        facts = _facts_of(row, line.strip() or dump_row(row))
        text = f'{{"time": "{time}", "level": "{log_level(row)}", "event": "{row.row}", {facts}'
        try:
            self._file.write(text + "\n")
        except OSError:
            return

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._file.close()


def _facts_of(row: Row, line: bytes) -> str:
    """What a line of the log says of a row after its kind, up to the end of the object; no empty tables."""
    text, kind = line.decode(), f'{{"row":"{row.row}",'
    if text.startswith(kind) and "{}" not in text:  # a delivery to ten thousand is as many lines: not parsed again
        return text[len(kind) :]
    facts = {key: value for key, value in json.loads(text).items() if key != "row" and value != {}}
    return escape_json(json.dumps(facts, ensure_ascii=False))[1:]


def log_level(row: Row) -> str:
    """The level: "error" for the end of a run that failed.

    "warning" for one that was interrupted, a note, and a site that failed, is missing or came late.
    """
    match row:
        case End(status="failed"):
            return "error"
        case End(status="interrupted") | Note():
            return "warning"
        case Roll():
            return "warning" if row.failed or row.late else "info"
        case Presence():
            return "warning" if row.missing else "info"
    return "info"
