"""A machine as the soak sees it: its folder, and what can befall its processes, its disk and its clock.

kill -9 is an exception that no code of fedloom's catches, raised at one of the steps at which a process can be told to
have come: a file was renamed or had on disk, a message was sent or fetched. What the unwinding code still does to the
folder is taken back, since a process that is killed does none of it: the folder is what it was at the kill.
A full disk is the limit that the system puts on the size of files, which holds for every writer of the process.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Self
from unittest import mock

from benchmarks.soak.timeline import Timeline
from fedloom.site import clock

NO_LIMIT = resource.RLIM_INFINITY


class Killed(BaseException):
    """kill -9. No Exception: nothing that handles errors may hold it up."""


class Machine:
    """One machine. kill_in: steps until its process is killed; room: size that a file may have; skew: of its clock."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.kill_in: int | None = None
        self.room: int | None = None
        self.skew = timedelta()

    def step(self) -> None:
        """A point at which the process can be killed."""
        if self.kill_in is None:
            return
        self.kill_in -= 1
        if self.kill_in < 0:
            self.kill()

    def kill(self) -> None:
        """End the process, with the folder as it is now."""
        self.kill_in = None
        if self.folder.exists():
            shutil.copytree(self.folder, self._frozen, symlinks=True)
        raise Killed(self.name)

    def thaw(self) -> None:
        """Put the folder back to what it was when the process was killed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._frozen.exists():
            os.rename(self._frozen, self.folder)

    @property
    def _frozen(self) -> Path:
        return self.folder.with_name(self.folder.name + ".frozen")


class Machines:
    """Which machine's code is running now, and the system calls that depend on it."""

    def __init__(self, timeline: Timeline, server: Machine) -> None:
        self.timeline = timeline
        self.here = self.server = server

    @contextmanager
    def on(self, machine: Machine) -> Iterator[None]:
        """Run code of this machine."""
        before, self.here = self.here, machine
        self.apply()
        try:
            yield
        finally:
            self.here = before
            self.apply()

    def apply(self) -> None:
        """Let the limit hold that the machine has now."""
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (NO_LIMIT if self.here.room is None else self.here.room, hard))

    def sleep(self, seconds: float) -> None:
        """Stands for time.sleep: other machines work meanwhile."""
        self.timeline.advance(seconds)
        self.apply()
        self.here.step()

    @contextmanager
    def simulated(self) -> Iterator[None]:
        """Have time, renaming and syncing go through here. Nothing is synced: no kill takes what the system has."""
        rename: Callable[..., None] = os.replace

        def replaced(source: object, target: object) -> None:
            self.here.step()
            rename(source, target)
            self.here.step()

        machines = self

        class MachineTime(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Self:
                return super().now(tz) + machines.here.skew

        with ExitStack() as stack:
            for owner, name, stand_in in (
                (time, "sleep", self.sleep),
                (time, "monotonic", lambda: self.timeline.now),
                (os, "fsync", lambda descriptor: self.here.step()),
                (os, "replace", replaced),
                (clock, "datetime", MachineTime),
            ):
                stack.enter_context(mock.patch.object(owner, name, stand_in))
            try:
                yield
            finally:
                self.here = self.server
                self.server.room = None
                self.apply()
