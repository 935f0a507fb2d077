"""The time of a site's record: the system's, unless that is set to another while the worker runs."""

from __future__ import annotations

import logging
import sys
import time
from datetime import UTC, datetime, timedelta

log = logging.getLogger("fedloom.worker")

JUMP = timedelta(minutes=5)
"""How far the system's time may be from the time that really passed. NTP stays within seconds, once it has begun; a
whole day of bytes would need a jump of 24 hours."""


def uptime() -> float:
    """Seconds that nobody can set, those in which the machine slept included where the system counts them."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Clock:
    """UTC, as the system had it when this was made, and the time that passed since."""

    def __init__(self) -> None:
        self._began, self._uptime = datetime.now(UTC), uptime()
        self._jumped = False

    def now(self) -> datetime:
        """The system's time if it went on as time does; otherwise what it would be if it had, and a line of the log."""
        said, passed = datetime.now(UTC), timedelta(seconds=uptime() - self._uptime)
        jump = said - self._began - passed
        if abs(jump) <= JUMP:
            self._jumped = False
            return said
        if not self._jumped:
            log.warning(
                "the system's clock was set from about %s to %s; the record goes on by the time that really passed. "
                "If the clock is right now, start the worker anew",
                (said - jump).isoformat(timespec="seconds"),
                said.isoformat(timespec="seconds"),
            )
        self._jumped = True
        return said - jump
