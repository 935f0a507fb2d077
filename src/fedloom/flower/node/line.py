"""Requests that wait for the worker, first come, first served; one that is withdrawn or too old leaves the line."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Literal

Why = Literal["withdrawn", "expired"]


@dataclass(eq=False, slots=True)
class Waiting:
    """A request. until: on the monotonic clock, when it is not worth beginning any more. withdrawn: nobody wants it."""

    ask: str
    job: str
    round: int
    until: float = math.inf
    withdrawn: bool = False

    @property
    def left(self) -> float:
        """Seconds until it is not worth beginning any more."""
        return self.until - time.monotonic()


class Line:
    """The first in it is with the worker."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._held: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._held)

    def enter(self, request: Waiting) -> Why | None:
        """Wait until the worker is free. Why the request left the line before, if it did; otherwise `leave` ends it."""
        with self._change:
            self._held.append(request)
            while request.left > 0 and not request.withdrawn and self._held[0] is not request:
                self._change.wait(None if math.isinf(request.left) else request.left)
            if request.left > 0 and not request.withdrawn:
                return None
            self._remove(request)
        return "withdrawn" if request.withdrawn else "expired"

    def leave(self, request: Waiting) -> None:
        """The worker has answered it."""
        with self._change:
            self._remove(request)

    def _remove(self, request: Waiting) -> None:
        self._held.remove(request)
        self._change.notify_all()

    def withdraw(self, job: str, round: int) -> Waiting | None:
        """Nobody wants this turn: if it waits it leaves the line; if it is with the worker it is returned."""
        with self._change:
            mine = [held for held in self._held if (held.ask, held.job, held.round) == ("turn", job, round)]
            for held in mine:
                held.withdrawn = True
            self._change.notify_all()
            return next((held for held in mine if held is self._held[0]), None)

    def wait_for(self, request: Waiting, seconds: float) -> bool:
        """Whether a request is out of the line, now or within so many seconds."""
        with self._change:
            return self._change.wait_for(lambda: request not in self._held, seconds)
