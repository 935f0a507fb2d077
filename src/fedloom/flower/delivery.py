"""After the last round: every site that is there receives the result, however long the others were waited for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from fedloom.flower.fleet import Fleet
from fedloom.flower.gathering import LOOK_SECONDS, MOST_REPEATS, POLL_SECONDS
from fedloom.flower.messages import Reply


@dataclass(eq=False, slots=True)
class Delivery:
    """The result on its way to the sites. `flower.grace` is about updates, and does not end it; the deadline does.

    send(site) sends the result; stray(reply) takes what else comes in; looked() is called after every look at who is
    there. confirmed: who has it; missing: site → why it has not.
    """

    fleet: Fleet
    sites: Collection[str]
    deadline: float
    send: Callable[[str], None]
    stray: Callable[[Reply], None]
    looked: Callable[[], None]
    confirmed: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)

    def play(self) -> None:
        """Deliver it to all that are connected, and wait for them; whoever is not is given up at once."""
        until, looked = time.monotonic() + self.deadline, -math.inf
        while self.waiting:
            for reply in self.fleet.collect():
                self.take(reply)
            now = time.monotonic()
            if now >= until:
                break
            if now - looked >= LOOK_SECONDS:
                looked = now
                self.fleet.look()
                self.looked()
            for site in self.waiting:
                self.reach(site)
            if self.waiting:
                time.sleep(POLL_SECONDS)
        self.missing |= dict.fromkeys(self.waiting, f"did not answer within {self.deadline:g} s")

    @property
    def waiting(self) -> list[str]:
        """The sites that may still confirm."""
        return sorted(set(self.sites) - self.confirmed - self.missing.keys())

    def reach(self, site: str) -> None:
        """Send it to a site that is there, again if it was lost on the way."""
        if not self.fleet.is_here(site):
            if not self.fleet.is_greeting:  # a node that has not said its name may be this site's
                self.missing[site] = self.fleet.explain_absence(site)
        elif not self.fleet.is_asked(site, "deliver"):
            self.repeats[site] = self.repeats.get(site, 0) + 1
            if self.repeats[site] > MOST_REPEATS:
                self.missing[site] = f"was lost {MOST_REPEATS} times on the way"
                return
            self.send(site)

    def take(self, reply: Reply) -> None:
        """One reply."""
        site = reply.asked.site
        self.stray(reply)
        if reply.asked.ask != "deliver" or reply.gone or site not in self.waiting:
            return
        if reply.error:
            self.missing[site] = reply.error
        else:
            self.confirmed.add(site)
