"""One phase of a secure sum over Flower's messages: who is asked, what comes back, who has vanished."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fedloom.flower.fleet import Fleet
from fedloom.flower.gathering import LOOK_SECONDS, MOST_REPEATS, POLL_SECONDS
from fedloom.flower.messages import Reply
from fedloom.secagg import Phase


@dataclass(eq=False, slots=True)
class Exchange:
    """The replies of one phase while they come in.

    waiting: the sites that may still answer. enough: sites without which there is no sum; once so many have answered,
    the others have `grace` seconds, if it is a number. send(site) asks a site; took(site, message) is called for what
    answers; stray(reply) takes what else comes in; looked() is called after every look at who is there.
    missing: site → why it has not answered.
    """

    fleet: Fleet
    round: int
    phase: Phase
    waiting: set[str]
    enough: int
    deadline: float
    grace: float | None
    send: Callable[[str], None]
    took: Callable[[str, bytes], None]
    stray: Callable[[Reply], object]
    looked: Callable[[], None]
    missing: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    answered: int = 0
    began: float = field(default_factory=time.monotonic)

    def play(self) -> Iterator[tuple[str, bytes]]:
        """(site, its message) as they come, until everybody has answered or vanished, or time is up."""
        until, looked, quorum = self.began + self.deadline, -math.inf, math.inf
        for site in sorted(self.waiting):
            self.reach(site)
        while self.waiting:
            for reply in self.fleet.collect():
                found = self.take(reply)
                if found is not None:
                    yield reply.asked.site, found
                del reply, found  # as large as its payload
            now = time.monotonic()
            if self.answered >= self.enough and math.isinf(quorum):
                quorum = now
            if now >= until or (self.grace is not None and now >= quorum + self.grace):
                break
            if not self.waiting:
                return
            if now - looked >= LOOK_SECONDS:
                looked = now
                self.fleet.look()
                self.looked()
                for site in sorted(self.waiting):
                    self.reach(site)
            time.sleep(POLL_SECONDS)
        for site in sorted(self.waiting):
            self.lose(site, "did not answer in time")

    def reach(self, site: str) -> None:
        """Ask a site that is there and has not been asked, or whose message was lost."""
        if not self.fleet.is_here(site):
            self.lose(site, self.fleet.explain_absence(site))
        elif not self.fleet.is_asked(site, "sum", self.began):
            self.repeats[site] = self.repeats.get(site, 0) + 1
            if self.repeats[site] > MOST_REPEATS:
                self.lose(site, f"was lost {MOST_REPEATS} times on the way")
            else:
                self.send(site)

    def lose(self, site: str, reason: str) -> None:
        """A site has vanished."""
        self.waiting.discard(site)
        self.missing[site] = reason

    def take(self, reply: Reply) -> bytes | None:
        """The message in a reply to this phase; None for any other reply."""
        asked, said, site = reply.asked, reply.said, reply.asked.site
        ours = asked.ask == "sum" and asked.round == self.round and site in self.waiting
        if not ours or reply.gone or (reply.parcel and not reply.error and said.phase != self.phase):
            self.stray(reply)
            return None
        if reply.error or reply.parcel is None:
            self.lose(site, reply.error)
            return None
        if len(reply.parcel.payloads) != 1:
            self.lose(site, f"refused: {len(reply.parcel.payloads)} messages where one was expected")
            return None
        self.waiting.discard(site)
        self.answered += 1
        self.took(site, reply.parcel.payloads[0])
        return reply.parcel.payloads[0]
