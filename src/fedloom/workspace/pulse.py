"""The file of a run's metrics, which also says that the run's process lives: without that, a dead run looks like one
that waits for its sites.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from fedloom.report.metrics import renew_update

BEAT_SECONDS = 30.0
"""Between two signs of life: Prometheus looks every minute or so. One of them is a file of some kilobytes, written."""


class MetricsFile:
    """Whole at any time. From the first text on its time is renewed until `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text = ""
        self._over = threading.Event()
        self._writing = threading.Lock()
        self._beating: threading.Thread | None = None

    def write(self, text: str) -> None:
        """Replace the text."""
        with self._writing:
            self._text = text
            write_whole(self._path, text)
        if self._beating is None:
            self._beating = threading.Thread(target=self._beat, daemon=True)
            self._beating.start()

    def close(self) -> None:
        """No further sign of life."""
        self._over.set()
        if self._beating is not None:
            self._beating.join()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with self._writing, suppress(OSError):  # a full disk is for the run itself to find
                write_whole(self._path, renew_update(self._text, time.time()))


def write_whole(path: Path, text: str) -> None:
    """Replace a file by one that is whole, whenever the machine stops."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
