"""Asynchronous rounds across machines: turns begin and end at the sites' own pace until the server's buffer is full.

A round that is over leaves the turns under way as they are: their updates come in when they come, in a later round.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from fedloom.errors import FedloomError, RoundError
from fedloom.flower.gathering import LOOK_SECONDS, MOST_REPEATS, POLL_SECONDS
from fedloom.flower.messages import Reply
from fedloom.records.ledger import Roll
from fedloom.server.buffer import Buffer, choose_next
from fedloom.server.timeline import draw_order

if TYPE_CHECKING:
    from fedloom.flower.sites import FlowerSites
    from fedloom.server.loop import Rounds


class Filling:
    """One round's updates while they come in. order: who is asked before whom."""

    def __init__(self, sites: FlowerSites, rounds: Rounds, buffer: Buffer) -> None:
        self.sites, self.rounds, self.buffer = sites, rounds, buffer
        self.fleet, self.round = sites.fleet, rounds.round
        self.rules = sites.setup.config.flower
        self.order = draw_order(sites.setup.config.federation, tuple(sites), rounds.round)
        self.failed: dict[str, str] = {}
        self.late: dict[str, str] = {}
        self.repeats: dict[str, int] = {}
        self.tries = 0
        self.began = time.monotonic()

    def play(self) -> None:
        """Fill the buffer. At the deadline a step is taken with fewer updates, `flower.min_replies` at least.

        Raises RoundError where even those cannot be had.
        """
        while self.tries <= self.rules.retries and not self.has_quorum:
            self.tries += 1
            for site in self.failed:
                self.buffer.lose(site)  # it is asked again
            self.failed, self.repeats = {}, {}
            self.wait()
        if not self.has_quorum:
            raise RoundError(self.explain_end())

    @property
    def has_quorum(self) -> bool:
        """Whether the server may take a step once nobody is waited for any more."""
        return len(self.buffer.senders) >= min(self.rules.min_replies, self.buffer.size)

    @property
    def can_go_on(self) -> bool:
        """Whether an update may still come in this round."""
        open_sites = (site for site in self.order if site not in self.failed)
        return bool(self.buffer.under_way) or any(self.buffer.may_begin(site, self.round) for site in open_sites)

    def wait(self) -> None:
        """Begin turns and take replies until the buffer is full, nobody is left who could fill it, or time is up."""
        until, looked = time.monotonic() + self.rules.deadline, -LOOK_SECONDS
        while True:
            for reply in self.fleet.collect():
                self.take(reply)
            now = time.monotonic()
            if self.buffer.is_full or not self.can_go_on or now >= until:
                return
            if now - looked >= LOOK_SECONDS:
                looked = now
                self.fleet.look()
                self.sites.note_presence(self.rounds)
            self.begin_turns()
            time.sleep(POLL_SECONDS)

    def begin_turns(self) -> None:
        """Ask every site that is there and free for a turn; again, a bounded number of times, if it was lost."""
        for site in sorted(self.buffer.under_way):
            if self.fleet.open_turn(site) is None:
                self.buffer.lose(site)
        here = [s for s in self.order if self.fleet.is_here(s) and not self.fleet.open_turn(s) and s not in self.failed]
        for site in choose_next(self.order, self.buffer, self.round, here):
            self.repeats[site] = self.repeats.get(site, 0) + 1
            if self.repeats[site] > MOST_REPEATS:
                self.failed[site] = f"was lost {MOST_REPEATS} times on the way"
            else:
                self.begin(site)

    def begin(self, site: str) -> None:
        """Ask a site for a turn from the newest version.

        Saved first where an update of the site's waits that no checkpoint has: it is told that this one counts.
        """
        if site in self.sites.unsaved:
            self.rounds.save(midway=True)
        self.buffer.begin(site, self.round, self.rounds.server)
        self.sites.ask_turn(self.rounds, site, self.rules.deadline)

    def take(self, reply: Reply) -> None:
        """Sort one reply. What belongs to no turn under way was lost before, or is no turn at all."""
        asked, site, said = reply.asked, reply.asked.site, reply.said
        turn = self.buffer.begun.get(site) if site in self.buffer.under_way else None
        if asked.ask != "turn" or turn is None or turn.round != asked.round or said.dropped or reply.gone:
            reason = self.sites.take_stray(self.rounds, reply)
            if reason:
                self.late[site] = reason
            return
        try:
            self.take_in(site, reply)
        except FedloomError as error:
            self.buffer.end(site)
            self.failed[site] = str(error)
        else:
            self.failed.pop(site, None)

    def take_in(self, site: str, reply: Reply) -> None:
        """Put the update in a reply into the buffer, which counts it. Raises the FedloomError that says why not."""
        server = self.rounds.server
        payload, seen = self.sites.read_update(self.rounds, site, reply, self.buffer.base_of(site, server))
        self.buffer.take_in(site, payload, seen, server)
        self.sites.known[site] = replace(self.sites.known[site], counted=reply.asked.round)
        self.sites.unsaved.add(site)

    def roll(self) -> Roll:
        """The report of the round."""
        absent = {site: reason for site in self.order if (reason := self.fleet.explain_absence(site))}
        failed = {site: reason for site, reason in {**absent, **self.failed}.items() if site not in self.buffer.senders}
        answered = tuple(sorted(self.buffer.senders))
        return Roll(self.round, answered, failed, self.late, self.tries, time.monotonic() - self.began)

    def explain_end(self) -> str:
        """Why the step has too few updates."""
        silent = dict.fromkeys(sorted(self.buffer.under_way), "is still at its turn")
        reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted({**silent, **self.roll().failed}.items()))
        return (
            f"round {self.round}: {len(self.buffer.senders)} updates came in in {self.tries} tries, flower.min_replies "
            f"is {self.rules.min_replies} and federation.buffer_size {self.buffer.size} ({reasons}); all rounds before "
            "it are kept: go on with --resume"
        )
