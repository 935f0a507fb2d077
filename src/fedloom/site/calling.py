"""Asking a site's worker, from another process of the same machine. Loads no torch."""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path

from fedloom.errors import SiteError
from fedloom.site.protocol import Parcel, exchange

log = logging.getLogger("fedloom.relay")

WORKER_SECONDS = 120.0
"""How long a worker that was stopped may take to come back."""
PAUSE_SECONDS = 0.25


def call_worker(parcel: Parcel, path: Path, token: Path, patience: float = WORKER_SECONDS) -> Parcel:
    """The worker's reply. A worker that is away or dies meanwhile is asked again until `patience` seconds are over.

    Raises SiteError, without a path in it, if the worker does not come back or the token cannot be read. Asking again
    is harmless: the worker repeats what it has answered.
    """
    until = time.monotonic() + patience
    while True:
        try:
            shown = token.read_text(encoding="utf-8").strip()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(str(path))
                return exchange(connection, shown, parcel)
        except OSError as error:
            if time.monotonic() > until:
                log.warning("the worker at %r, with the token in %r, is away: %s", str(path), str(token), error)
                raise SiteError(
                    "the worker is away, or its token cannot be read: start it with `fedloom worker SITE.toml`; the "
                    "log of the site's node says more"
                ) from None
            time.sleep(PAUSE_SECONDS)
