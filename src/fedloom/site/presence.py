"""What a worker is at, for people beside it: the last request, in a file of its state folder. Loads no torch."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedloom.site.approval import time_text
from fedloom.site.clock import JUMP
from fedloom.site.protocol import Request

log = logging.getLogger("fedloom.worker")
FILE = "worker.json"
LENGTH = 512
"""Bytes of the note; what it says takes half of them at most."""


@dataclass(frozen=True, slots=True)
class Presence:
    """The last request: what was asked, of which job and round, when it came (UTC); answered: "" while it goes on."""

    __pydantic_config__ = ConfigDict(extra="ignore", strict=True)
    ask: str
    job: str
    round: int
    came: str
    answered: str = ""


_PRESENCE: TypeAdapter[Presence] = TypeAdapter(Presence)


def note_request(state: Path, asked: Request, came: datetime, answered: datetime | None = None) -> None:
    """Write down that a request came, or that it was answered. A full disk is no reason not to answer."""
    said = Presence(asked.ask, asked.job, asked.round, time_text(came), time_text(answered) if answered else "")
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(state / FILE, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            # In place and of one length: a reader never finds half of it, and no directory has to be written.
            os.pwrite(file, json.dumps(asdict(said)).encode().ljust(LENGTH), 0)
        finally:
            os.close(file)
    except OSError as error:
        log.warning("%s cannot be written: %s", state / FILE, error)


def read_presence(state: Path) -> Presence | None:
    """The last request, or None where none has come yet."""
    try:
        return _PRESENCE.validate_json((state / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def is_running(path: str) -> bool:
    """Whether a worker listens on this socket; one that is busy does too."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.setblocking(False)  # a worker with many callers waiting is there as well
        try:
            return caller.connect_ex(path) in (0, errno.EAGAIN, errno.EINPROGRESS)
        except OSError:  # a path that is too long for a socket
            return False


def compare_clocks(asked: Request, now: datetime) -> None:
    """Log it where the server's clock and this machine's are far apart: the times of the record are this machine's."""
    if asked.time is None:
        return
    apart = timedelta(seconds=now.timestamp() - asked.time)
    if abs(apart) > JUMP:
        log.warning(
            "this machine's clock is %s %s the server's, as job %s said hello: unless the request was on its way for "
            "so long, one of the two is wrong; max_bytes_day and the times of the audit record go by this machine's",
            timedelta(seconds=round(abs(apart.total_seconds()))),
            "ahead of" if apart > timedelta() else "behind",
            asked.job,
        )
