"""A run's points to its trackers: what fails is said once, tried again later, and stops nothing else."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedloom.records.text import to_printable
from fedloom.trackers.follow import RunFollower
from fedloom.trackers.sinks import TRACKERS, Ending, Sink, TrackedRun

LOOK_SECONDS = 1.0
RETRY_SECONDS = 60.0
"""After a failure: a server that is started anew is back by then, and one that is off costs a try a minute."""
LOCK = ".tracking.lock"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Destination:
    """Which trackers, and under which names there. name: "" for that of the run's folder."""

    trackers: tuple[str, ...]
    project: str
    name: str = ""


class Outlet:
    """One tracker. It is opened when there is something to send, and anew after every failure."""

    def __init__(self, name: str, say: Say) -> None:
        self.name = name
        self.failed = False  # whether the last try failed
        self._say, self._told = say, False
        self._sink: Sink | None = None
        self._rest = 0.0  # until then nothing is tried

    def send(self, follower: RunFollower, run: TrackedRun) -> None:
        """Bring the tracker up to the newest point."""
        if follower.points and time.monotonic() >= self._rest:
            self._try(lambda sink: sink.send(follower.points), run)

    def end(self, follower: RunFollower, run: TrackedRun, ending: Ending) -> None:
        """The rest of the points, and how the run ended."""
        self._rest = 0.0
        self.send(follower, run)
        if not self.failed:
            self._try(lambda sink: sink.end(ending), run)
        self._sink = None

    def _try(self, act: Callable[[Sink], None], run: TrackedRun) -> None:
        try:
            self._sink = self._sink or TRACKERS[self.name].open(run)
            act(self._sink)
            self.failed = False
        except Exception as error:  # whatever a library raises, the others go on
            self._sink, self.failed, self._rest = None, True, time.monotonic() + RETRY_SECONDS
            if not self._told:
                self._told = True
                words = to_printable(str(error) or type(error).__name__)
                self._say(f"{TRACKERS[self.name].title} takes no points: {words}")


def follow_run(folder: Path, to: Destination, is_over: Callable[[], bool], say: Say = print) -> list[str]:
    """Send the run's points until it is over; the trackers that do not have all of them then.

    is_over: waits a moment and says whether nothing more is to come. Raises CheckpointError where the folder holds no
    run, or a ledger that cannot be read.
    """
    follower, outlets = RunFollower(folder), [Outlet(name, say) for name in to.trackers]
    over = False
    while not over:
        over = is_over()  # before the look: nothing is written after it
        follower.look()
        if follower.points or over:
            run = follower.describe(to.project, to.name)
            for outlet in outlets:
                outlet.send(follower, run)
    ending = follower.judge()
    for outlet in outlets:
        outlet.end(follower, run, ending)
    return [outlet.name for outlet in outlets if outlet.failed]


def take_turn(folder: Path, wait: Callable[[], bool]) -> IO[str] | None:
    """The lock of whoever sends the run's points, so that two never do; None where `wait` gives up.

    wait: called while another has the lock; it waits a moment and says whether to go on trying.
    """
    lock = (folder / LOCK).open("a+", encoding="utf-8")
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            return lock
        if not wait():
            lock.close()
            return None


def say_how_to_send(folder: Path, trackers: Sequence[str]) -> str:
    """The command that sends what is missing."""
    return f"`fedloom track {folder} --to {','.join(trackers)}` sends what is missing"
