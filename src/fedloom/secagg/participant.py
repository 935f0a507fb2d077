"""A site's answers to the phases of one sum, bytes for bytes. A question that is repeated gets the same answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedloom.errors import SecureSumError
from fedloom.secagg.invitation import Invitation
from fedloom.secagg.masks import Integers
from fedloom.secagg.member import PHASES, Member

Phase: TypeAlias = Literal["announce", "share", "mask", "agree", "open"]


class Participant:
    """One site in one sum.

    job, round, values, bits: of the sum as the site knows it. least: sites that must be in a sum at least, by the run's
    settings and by the site's own rules. vector: the integers that it adds, asked for once they are to be masked.
    Raises SecureSumError for an invitation that is none, or to a sum that the site does not take part in.
    """

    def __init__(
        self,
        site: str,
        identity: Ed25519PrivateKey,
        invitation: Invitation,
        *,
        job: str,
        round: int,
        values: int,
        bits: int,
        least: int,
        vector: Callable[[], Integers],
    ) -> None:
        session = invitation.session(job, round, values, bits)
        if session.threshold < least:
            raise SecureSumError(
                f"a secure sum that may be of {session.threshold} sites: this site takes part in sums of {least} or "
                "more"
            )
        if invitation.keys.get(site) != identity.public_key().public_bytes_raw():
            raise SecureSumError(f"the server has another key for site {site!r} than the site's own")
        self._member = Member(session, site, identity, invitation.roster())
        self._vector = vector
        self._last: tuple[str, bytes, bytes] = ("", b"", b"")

    def answer(self, phase: Phase, message: bytes) -> bytes:
        """The reply to what the server sends in a phase. Raises SecureSumError where it is not what it should be."""
        asked, told, reply = self._last
        if (asked, told) == (phase, message):
            return reply
        reply = self._answer(phase, message)
        self._last = phase, message, reply
        return reply

    def _answer(self, phase: Phase, message: bytes) -> bytes:
        member = self._member
        match phase:
            case "announce":
                return member.announce()
            case "share":
                return member.share(message)
            case "mask":
                return member.mask(message, self._vector())
            case "agree":
                return member.agree(message)
            case "open":
                return member.open(message)
        raise SecureSumError(f"a secure sum has no phase {phase!r}: expected {', '.join(PHASES)}")
