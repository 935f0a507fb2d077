"""Who writes into a run's folder: one process at a time, known by a lock that the system drops when it ends."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedloom.errors import CheckpointError

LOCK = ".lock"
"""Its name in the folder. It holds the process and the machine of whoever wrote last: "PID HOST"."""
PATIENCE = 0.5
"""Seconds for which a lock that is held is tried again: whoever looks at the folder holds it for an instant."""


@dataclass(frozen=True, slots=True)
class Writer:
    """The process that wrote into the folder last. alive: whether it does still; None where that cannot be seen.

    A lock tells of processes on the same machine. pid: 0 where it is not known.
    """

    alive: bool | None
    pid: int = 0
    host: str = ""


def take_lock(folder: Path) -> IO[str]:
    """The folder's lock, held until it is closed or this process ends. Raises CheckpointError where another has it."""
    lock = (folder / LOCK).open("a+", encoding="utf-8")
    until = time.monotonic() + PATIENCE
    while not _locked(lock, fcntl.LOCK_EX):
        if time.monotonic() > until:
            lock.close()
            raise CheckpointError(
                f"another process is working in {folder}{_whose(find_writer(folder))}: wait for it, or choose another "
                "--out"
            )
        time.sleep(PATIENCE / 10)
    lock.truncate(0)
    lock.write(f"{os.getpid()} {platform.node()}\n")
    lock.flush()
    return lock


def find_writer(folder: Path) -> Writer:
    """Who writes into the folder, or did last."""
    try:
        with (folder / LOCK).open(encoding="utf-8", errors="replace") as lock:
            free = _locked(lock, fcntl.LOCK_SH)  # shared: two who look do not see each other
            pid, _, host = lock.read(300).strip().partition(" ")
    except FileNotFoundError:
        return Writer(alive=False)
    except OSError:  # it may not be read
        return Writer(alive=None)
    elsewhere = host not in ("", platform.node())
    return Writer(None if free and elsewhere else not free, int(pid) if pid.isdecimal() else 0, host)


def _locked(lock: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _whose(writer: Writer) -> str:
    return f" (process {writer.pid} on {writer.host})" if writer.pid else ""
