"""Sites across machines under secure aggregation: they train first, and who has trained takes part in the sum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.errors import RoundError, WireError
from fedloom.flower.exchange import Exchange
from fedloom.flower.fleet import ANSWER_SECONDS
from fedloom.flower.gathering import Gathering
from fedloom.flower.messages import Reply
from fedloom.flower.settings import shared_settings
from fedloom.records.ledger import Transfer
from fedloom.rounds.agreement import name_sum
from fedloom.rounds.checks import UpdateFacts
from fedloom.secagg import Phase
from fedloom.server.attendance import Attendance
from fedloom.server.engine import Updates
from fedloom.server.journal import Journal
from fedloom.server.sums import collect_sum, hidden_training, record_message
from fedloom.site.protocol import Parcel
from fedloom.workspace.occupied import SECURE_SUM

if TYPE_CHECKING:
    from fedloom.flower.sites import FlowerSites
    from fedloom.server.loop import Rounds

READY = UpdateFacts(0, frozenset(), 0.0, b"", 0)
"""All that the server knows of an update that it does not see."""


class SecretRound:
    """One round: who is ready, with which key, and then the phases of the sum.

    keys: site → its lasting public key, of those that have trained. received: bytes that each was sent before.
    """

    def __init__(self, sites: FlowerSites, rounds: Rounds, present: Attendance) -> None:
        self.sites, self.rounds = sites, rounds
        self.keys: dict[str, bytes] = {}
        self.received: dict[str, int] = {}
        rules, secure = sites.setup.config.flower, sites.setup.job.secure
        assert secure is not None
        server = rounds.server
        rests_on = f"{rounds.round} {server.version} {server.digest} of job {sites.fleet.facts['job']}"
        self.journal = Journal(rounds.folder.path / SECURE_SUM, rests_on)
        self.least = rules.min_replies
        # So that nobody closes the round on those without whom there is no sum.
        needed = min(max(self.least, secure.threshold_of(len(present.asked))), len(present.asked))
        self.gathering = Gathering(
            sites.fleet,
            rules.model_copy(update={"min_replies": needed}),
            sites.setup.job.caps,
            rounds.round,
            present.asked,
            partial(sites.ask_turn, rounds),
            self.check,
            partial(sites.take_stray, rounds),
            partial(sites.note_presence, rounds),
        )

    def collect(self) -> Updates:
        """The sum of the round, or why there is none. Raises RoundError where fewer than flower.min_replies trained."""
        try:
            self.gathering.play()
        except RoundError:
            if len(self.gathering.answers) < self.least:
                raise
        finally:
            self.sites.note_roll(self.rounds, self.gathering.roll())
        told = shared_settings(self.sites.setup.config)
        name = name_sum(str(self.sites.fleet.facts["job"]), told, self.rounds.server)
        return collect_sum(self.rounds, name, self.keys, self.ask, self.journal)

    def check(self, site: str, reply: Reply) -> UpdateFacts:
        """Take down that a site has trained. Raises the FedloomError that says why it cannot be in the sum."""
        self.sites.locate(self.rounds, site, reply)
        if reply.error or reply.parcel is None:
            raise RoundError(reply.error)
        said, round = reply.said, self.rounds.round
        if reply.parcel.payloads or not said.key:
            raise WireError("refused: an update in place of a key: the site does not take part in the secure sum")
        self.sites.know(site, self.rounds.server.version, self.rounds.server.digest)
        self.received[site] = self.sites.sent.pop(site, 0)
        self.rounds.folder.ledger.append(hidden_training(round, site, said.steps, said.seconds))
        if said.spent and self.journal.invitation is None:
            self.rounds.note(
                round,
                f"client {site}: its vector of this round left in a sum that was not completed, and leaves in no other",
            )
        else:
            self.keys[site] = bytes.fromhex(said.key)
        return READY

    def ask(self, phase: Phase, messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """Send each site its message of a phase; what comes back. Who does not answer is noted with the reason."""
        rounds, rules = self.rounds, self.sites.setup.config.flower

        def send(site: str) -> None:
            record_message(rounds, site, phase, "down", messages[site])
            rounds.folder.ledger.sync()  # first, so that nothing leaves that a crash could leave uncounted
            parcel = Parcel({"phase": phase}, (messages[site],))
            fleet = self.sites.fleet
            fleet.post(fleet.names[site], site, "sum", rounds.round, parcel, rules.deadline + ANSWER_SECONDS)

        exchange = Exchange(
            self.sites.fleet,
            rounds.round,
            phase,
            set(messages),
            self.journal.invitation.threshold if self.journal.invitation else len(messages),
            rules.deadline,
            rules.grace,
            send,
            partial(self.took, phase),
            partial(self.sites.take_stray, rounds),
            partial(self.sites.note_presence, rounds),
        )
        yield from exchange.play()
        for site, reason in sorted(exchange.missing.items()):
            rounds.note(rounds.round, f"client {site} has left the secure sum ({phase}): {reason}")

    def took(self, phase: Phase, site: str, message: bytes) -> None:
        """Record a site's message."""
        record_message(self.rounds, site, phase, "up", message)
        if phase == "mask":
            received = self.received.pop(site, 0)
            self.rounds.observer.client_finished(self.rounds.round, site, math.nan, len(message), received)


def take_late_message(rounds: Rounds, reply: Reply) -> None:
    """Count what came after its phase was over, or a second time: it has travelled."""
    if reply.asked.ask == "sum" and reply.parcel is not None:
        for payload in reply.parcel.payloads[:1]:
            site, size = reply.asked.site, len(payload)
            rounds.folder.ledger.append(Transfer(rounds.round, site, "up", "sum:late", size, {"secure_sum": size}))


def forget_sum(folder: Path) -> None:
    """Remove the last round's sum from a run's folder: the rounds are over."""
    (folder / SECURE_SUM).unlink(missing_ok=True)
