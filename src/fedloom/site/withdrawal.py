"""A turn that is not wanted any more: withdrawn while it trains, or too old to be begun when its time comes.

Neither is an error. Nothing of such a turn is kept, charged or sent; if it is asked for again, it is trained afresh.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from fedloom.errors import FedloomError, SiteError
from fedloom.site.protocol import SPOKEN, Parcel, Request, parse_request


class Dropped(FedloomError):
    """Ends a turn in the middle. `why`: as `Statement.dropped` says it."""

    def __init__(self, why: Literal["withdrawn", "expired"]) -> None:
        super().__init__(why)
        self.why = why


class Wanted:
    """Whether the turn that is worked on is still wanted.

    look: called before every forward pass; it hands the withdrawals that have come meanwhile to `answer`.
    """

    def __init__(self) -> None:
        self.look: Callable[[], None] = lambda: None
        self._turn: tuple[str, int] | None = None
        self._until = math.inf
        self._withdrawn = False

    @contextmanager
    def during(self, asked: Request, waited: float) -> Iterator[None]:
        """Work on a request that came `waited` seconds ago."""
        if asked.ask == "turn":
            self._turn, self._withdrawn = (asked.job, asked.round), False
            self._until = math.inf if asked.expires is None else time.monotonic() + asked.expires - waited
        try:
            yield
        finally:
            self._turn = None

    def check_time(self) -> None:
        """Raises Dropped where the turn is not worth beginning any more."""
        if time.monotonic() > self._until:
            raise Dropped("expired")

    def guard(self, check: Callable[[], object] = lambda: None) -> Callable[[], None]:
        """What to call before every forward pass: raises Dropped once the turn is withdrawn, and calls `check`."""

        def checked() -> None:
            self.look()
            if self._withdrawn:
                raise Dropped("withdrawn")
            check()

        return checked

    def answer(self, parcel: Parcel) -> Parcel:
        """The reply to a withdrawal that comes while a turn trains. Raises SiteError for any other request."""
        asked = parse_request(parcel.facts, SPOKEN)
        if asked.ask != "withdraw":
            raise SiteError(f"a training is interrupted by a withdrawal alone, not by {asked.ask!r}")
        stops = self._turn == (asked.job, asked.round)
        self._withdrawn |= stops
        return Parcel({"protocol": SPOKEN.newest, "stops": stops})
