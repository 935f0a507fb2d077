"""What a service tells systemd: that it is ready, what it does, and that it is alive (sd_notify(3)).

A datagram to the socket in NOTIFY_SOCKET; without it, outside of systemd, nothing happens. The sign of life comes from
a thread of its own, so that a training that takes hours is no hang: a process that is stopped, or stuck where no
Python runs, gives none, and systemd starts it anew.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def notify(text: str) -> None:
    """Tell systemd, in lines KEY=value. A systemd that does not listen is no reason to end."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    address = "\0" + where[1:] if where.startswith("@") else where
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address)
        sender.sendall(text.encode())


@contextmanager
def as_service(status: str) -> Iterator[None]:
    """Say that the service is ready, keep giving signs of life, and say at the end that it stops."""
    ended = threading.Event()
    notify(f"READY=1\nSTATUS={status}")
    beat = threading.Thread(target=_beat, args=(ended,), name="watchdog", daemon=True)
    if pause_seconds() is not None:
        beat.start()
    try:
        yield
    finally:
        ended.set()
        notify("STOPPING=1")


def pause_seconds() -> float | None:
    """Seconds between two signs of life, a quarter of what systemd waits; None where it does not watch this process."""
    asked = os.environ.get("WATCHDOG_USEC", "")
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()) or not asked.isascii():
        return None
    return int(asked) / 4e6 if asked.isdecimal() and int(asked) else None


def _beat(ended: threading.Event) -> None:
    pause = pause_seconds()
    while pause is not None and not ended.wait(pause):
        notify("WATCHDOG=1")
