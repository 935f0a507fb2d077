"""The process beside a run that sends its points: what a tracker's library does, or a server that hangs, is out of the
run's way, and it outlives a run that is killed by as long as it takes to say so.
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedloom.errors import FedloomError
from fedloom.records.text import LONG, to_printable
from fedloom.trackers.outlets import LOOK_SECONDS, Destination, follow_run, say_how_to_send, take_turn
from fedloom.trackers.sinks import check_trackers

PATIENCE = 60.0
"""Seconds that a run waits at its end for the last points to be taken."""
LONGEST = 600.0
"""Seconds that it waits for the one before it once its run is over; a run that is not killed itself ends it earlier."""


class Tracking:
    """The process of a run, which is not there where no tracker is wanted.

    Raises ConfigError for a tracker that is not known or not installed.
    """

    def __init__(self, folder: Path, to: Destination) -> None:
        check_trackers(to.trackers)
        self._folder, self._to = folder, to
        self._process: subprocess.Popen[bytes] | None = None
        self._heard = b""

    def start(self) -> None:
        """Start it, in a group of its own: Ctrl-C is for the run, which then ends it."""
        if not self._to.trackers or self._process is not None:
            return
        words = json.dumps([str(self._folder.absolute()), self._to.trackers, self._to.project, self._to.name])
        with suppress(OSError):  # no memory for it, say: the run goes on
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedloom.trackers.process", words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        if self._process is not None and self._process.stdout is not None:
            os.set_blocking(self._process.stdout.fileno(), False)

    def troubles(self) -> list[str]:
        """What it has to say and has not said yet, in sentences."""
        if self._process is None or self._process.stdout is None:
            return []
        with suppress(OSError):
            while part := os.read(self._process.stdout.fileno(), 2**16):
                self._heard += part
        *lines, self._heard = self._heard.split(b"\n")
        return [to_printable(line.decode(errors="replace"), LONG) for line in lines]

    def close(self) -> list[str]:
        """Have it send the rest, and wait for that; what it said."""
        if self._process is None or self._process.stdin is None:
            return []
        with suppress(OSError):
            self._process.stdin.close()
        late: list[str] = []
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            late = [f"trackers took longer than {PATIENCE:g} s at the end of the run"]
        troubles = self.troubles()
        if self._process.stdout is not None:
            self._process.stdout.close()
        lost = bool(troubles or late or self._process.returncode)
        self._process = None
        return [*troubles, *late, *([say_how_to_send(self._folder, self._to.trackers)] if lost else [])]


def main(words: Sequence[str]) -> int:
    """What the process does: it follows the run until its standard input is closed, which the system does if the run is
    killed. Troubles are lines on its standard output.
    """
    folder, trackers, project, name = json.loads(words[1])
    os.nice(5)
    # Libraries shall neither read nor write where the run listens.
    ears, mouth = os.dup(0), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nowhere, number)

    def say(text: str) -> None:
        with suppress(OSError):  # nobody listens any more
            print(text, file=mouth, flush=True)

    def is_over() -> bool:
        return bool(select.select([ears], [], [], LOOK_SECONDS)[0])

    until = math.inf

    def may_wait() -> bool:
        """The process beside a run that was killed a moment ago may still be at work: its run goes on with this one."""
        nonlocal until
        if until == math.inf and is_over():
            until = time.monotonic() + LONGEST
        time.sleep(LOOK_SECONDS / 10)
        return time.monotonic() < until

    lock = take_turn(Path(folder), may_wait)
    if lock is None:
        say("another process sends the points of this run")
        return 1
    with lock:
        try:
            return bool(follow_run(Path(folder), Destination(tuple(trackers), project, name), is_over, say))
        except FedloomError as error:
            say(f"the points of this run cannot be sent: {error}")
            return 1


if __name__ == "__main__":
    code = main(sys.argv)
    sys.stdout.flush()
    os._exit(code)  # and no thread of a library keeps it
