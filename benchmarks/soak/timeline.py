"""Time that passes only when somebody sleeps, and what happens meanwhile."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Timeline:
    """Events in order of their time. Those of the same time happen in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Have this happen so many seconds from now."""
        heapq.heappush(self._due, (self.now + seconds, next(self._number), event))

    def advance(self, seconds: float) -> None:
        """Let this time pass, with all that is planned in it."""
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            when, _, event = heapq.heappop(self._due)
            self.now = max(self.now, when)
            event()
        self.now = end
