"""Tasks for workers that end, wait or fail; `test_workers` has them done."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from fedloom.errors import PolicyRefusal, UnknownKeyError


@dataclass(frozen=True)
class Ending:
    """Ends its worker as long as the file has more lines than there are ends; gives the numbers of all workers."""

    notes: Path
    ends: int

    def do(self, setup: object) -> list[int]:
        with self.notes.open("a") as file:
            file.write(f"{os.getpid()}\n")
        found = [int(line) for line in self.notes.read_text().splitlines()]
        if len(found) <= self.ends:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def describe(self) -> str:
        return "client lab, round 3"


@dataclass(frozen=True)
class Waiting:
    """Works far longer than any test."""

    notes: Path

    def do(self, setup: object) -> None:
        self.notes.write_text(str(os.getpid()))
        time.sleep(600)

    def describe(self) -> str:
        return "nothing"


@dataclass(frozen=True)
class Failing:
    """Raises an error that needs more than its text."""

    def do(self, setup: object) -> None:
        raise UnknownKeyError("no such key", "a.b")

    def describe(self) -> str:
        return "nothing"


@dataclass(frozen=True)
class Number:
    """Gives its number, the later ones first."""

    number: int

    def do(self, setup: object) -> int:
        if self.number < 0:
            raise PolicyRefusal("why", "that")
        return self.number

    def describe(self) -> str:
        return f"number {self.number}"
