"""One round's answers: who is asked, how long they are waited for, who failed and why, who is asked again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedloom.errors import FedloomError, RoundError
from fedloom.flower.fleet import Fleet
from fedloom.flower.messages import Reply
from fedloom.records.config import FlowerSettings
from fedloom.records.ledger import Roll
from fedloom.rounds.caps import Caps, find_outliers
from fedloom.rounds.checks import UpdateFacts

POLL_SECONDS = 0.25
"""Between two looks for replies: little beside the seconds of a turn."""
LOOK_SECONDS = 1.0
"""Between two looks at which nodes are there."""
MOST_REPEATS = 5
"""How often a site that was lost on the way is asked again within one try."""


@dataclass(eq=False, slots=True)
class Gathering:
    """The answers to one round while they come in.

    send(site, seconds) asks a site for a turn that is worth beginning for so long; check(site, reply) records a reply
    and returns its update, or raises a FedloomError that says why it is refused; stray(reply) takes what belongs to
    another round, or was not trained; looked() is called after every look at who is there.
    """

    fleet: Fleet
    rules: FlowerSettings
    caps: Caps
    round: int
    asked: Sequence[str]
    send: Callable[[str, float], None]
    check: Callable[[str, Reply], UpdateFacts]
    stray: Callable[[Reply], str | None]
    looked: Callable[[], None]
    answers: dict[str, UpdateFacts] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    late: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    tries: int = 0
    began: float = field(default_factory=time.monotonic)
    until: float = 0.0

    def play(self) -> dict[str, UpdateFacts]:
        """What was seen of the updates by site, at least `min_replies`. Raises RoundError where they cannot be had.

        Whoever has not answered by then is told that its turn is not wanted any more.
        """
        while self.tries <= self.rules.retries and not self.has_quorum:
            self.tries += 1
            self.repeats = {}
            self.look()
            for site in self.missing:
                self.failed.pop(site, None)
                self.start_clock()
                self.ask(site)
            self.start_clock()  # sending to many sites takes a while, which is not theirs
            self.wait()
            self.drop_outliers()
        for site in self.missing:
            turn = self.fleet.open_turn(site)
            if turn is not None and turn.round == self.round:
                self.fleet.withdraw(turn)
        if not self.has_quorum:
            raise RoundError(self.explain_end())
        return {site: self.answers[site] for site in sorted(self.answers)}

    @property
    def missing(self) -> list[str]:
        """The sites without an answer."""
        return [site for site in self.asked if site not in self.answers]

    @property
    def has_quorum(self) -> bool:
        """Whether enough sites have answered."""
        return len(self.answers) >= self.rules.min_replies

    def start_clock(self) -> None:
        """Let the deadline run from now on."""
        self.until = time.monotonic() + self.rules.deadline

    def look(self) -> None:
        """See who is there."""
        self.fleet.look()
        self.looked()

    def wait(self) -> None:
        """Take replies until everybody has answered or failed, the grace is over, or the deadline is."""
        looked = time.monotonic()
        quorum: float | None = None
        while True:
            for reply in self.fleet.collect():
                self.take(reply)
                del reply  # as large as its payload
            if all(site in self.failed for site in self.missing):
                return
            now = time.monotonic()
            if quorum is None and self.has_quorum:
                quorum = now
            over = quorum is not None and self.rules.grace is not None and now - quorum >= self.rules.grace
            if over or now >= self.until:
                return
            if now - looked >= LOOK_SECONDS:
                looked = now
                self.look()
                for site in self.missing:
                    if site not in self.failed:
                        self.ask(site)
            time.sleep(POLL_SECONDS)

    def ask(self, site: str) -> None:
        """Ask a site that is there and has no other turn; again, a bounded number of times, if it was lost."""
        if not self.fleet.is_here(site) or self.fleet.open_turn(site) is not None:
            return
        self.repeats[site] = self.repeats.get(site, 0) + 1
        if self.repeats[site] > MOST_REPEATS:
            self.failed[site] = f"was lost {MOST_REPEATS} times on the way"
            return
        self.send(site, max(self.until - time.monotonic(), 0.0))

    def take(self, reply: Reply) -> None:
        """Sort one reply. A site that is done with an older turn is asked for this one at once."""
        asked, site = reply.asked, reply.asked.site
        if asked.ask == "turn" and asked.round == self.round and not reply.said.dropped:
            self.take_answer(site, reply)
            return
        reason = self.stray(reply)
        if reason:
            self.late[site] = reason
        free = asked.ask in ("turn", "withdraw") and not reply.gone
        if free and site in self.missing and site not in self.failed:
            self.ask(site)

    def take_answer(self, site: str, reply: Reply) -> None:
        """The answer to a turn of this round."""
        if reply.gone:
            return
        if site in self.answers:  # it was asked twice, because its node seemed lost: its bytes have travelled twice
            self.stray(reply)
            return
        try:
            self.answers[site] = self.check(site, reply)
        except FedloomError as error:
            self.failed[site] = str(error)
        else:
            self.failed.pop(site, None)

    def drop_outliers(self) -> None:
        """Refuse updates that are out of proportion now, while others can still be asked again."""
        norms = {site: answer.norm for site, answer in self.answers.items()}
        for site, reason in find_outliers(norms, self.caps).items():
            del self.answers[site]
            self.failed[site] = f"refused: {reason}"

    def roll(self) -> Roll:
        """The report of the round."""
        failed = {site: self.failed.get(site) or self.explain_silence(site) for site in self.missing}
        return Roll(
            self.round, tuple(sorted(self.answers)), failed, self.late, self.tries, time.monotonic() - self.began
        )

    def explain_silence(self, site: str) -> str:
        """Why nothing was heard of a site, as far as the server knows."""
        turn = self.fleet.open_turn(site)
        if absence := self.fleet.explain_absence(site):
            return absence
        if turn is not None and turn.round != self.round:
            return f"is still at its turn of round {turn.round}"
        return "did not answer in time"

    def explain_end(self) -> str:
        """Why the round has too few answers."""
        reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(self.roll().failed.items()))
        return (
            f"round {self.round}: {len(self.answers)} of {len(self.asked)} sites answered in {self.tries} tries, "
            f"flower.min_replies is {self.rules.min_replies} ({reasons}); all rounds before it are kept: go on with "
            "--resume"
        )
