"""The server's part of a sum from beginning to end, however its sites are reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedloom.errors import SecureSumError
from fedloom.secagg.collector import Collector
from fedloom.secagg.invitation import Invitation
from fedloom.secagg.masks import Integers
from fedloom.secagg.participant import Phase
from fedloom.secagg.session import Session

Ask = Callable[[Phase, Mapping[str, bytes]], Iterable[tuple[str, bytes]]]
"""(phase, site → what it is sent) → (site, its reply) of each that answers, as they come: one may be as large as the
vector. Who does not answer is asked nothing more."""
Refuse = Callable[[str, str], None]
"""(site, reason): called for a reply that is not what it should be."""


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum modulo 2^bits, whose vectors it is of, and whose shares were wrong."""

    total: Integers
    sites: tuple[str, ...]
    liars: tuple[str, ...]


def play_sum(session: Session, invitation: Invitation, ask: Ask, refuse: Refuse) -> Sum:
    """All phases. A site that is silent or refused has vanished.

    Raises SecureSumError where fewer sites than the threshold are left: nothing of the sum is known then.
    """
    collector = Collector(session, invitation.roster())
    invited = invitation.write()
    steps: tuple[tuple[Phase, Callable[[str], bytes], Callable[[str, bytes], None]], ...] = (
        ("announce", lambda site: invited, collector.take_announced),
        ("share", lambda site: collector.announced(), collector.take_shares),
        ("mask", collector.sealed_for, collector.take_masked),
        ("agree", lambda site: collector.present(), collector.take_agreed),
        ("open", lambda site: collector.agreed(), collector.take_opened),
    )
    there = session.sites
    for phase, message, take in steps:
        replies = ask(phase, {site: message(site) for site in there})
        there = tuple(sorted([site for site, reply in replies if _took(take, site, reply, refuse)]))
        if not there:
            raise SecureSumError(f"no site has given an answer that counts ({phase})")
    return Sum(*collector.total())


def _took(take: Callable[[str, bytes], None], site: str, reply: bytes, refuse: Refuse) -> bool:
    try:
        take(site, reply)
    except SecureSumError as error:
        refuse(site, str(error))
        return False
    return True
