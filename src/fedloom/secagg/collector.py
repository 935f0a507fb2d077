"""The server's side of a secure sum. Messages come in any order within a phase; who sends none has vanished.

A phase is closed by the call that makes what goes out next. A site whose message is refused counts as vanished, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedloom.errors import SecureSumError
from fedloom.secagg.masks import Integers, add_mask, number_type, unpack_vector
from fedloom.secagg.messages import (
    COMMITMENT_BYTES,
    SEALED_BYTES,
    commitment,
    keys_signed,
    list_signed,
    put_by_site,
    put_list,
    split_message,
    take_by_site,
)
from fedloom.secagg.opening import Opening
from fedloom.secagg.seals import KEY_BYTES, SIGNATURE_BYTES, agree, check_signature, public_of
from fedloom.secagg.session import Session
from fedloom.secagg.shamir import SHARE_BYTES


class Collector:
    """The server in one session. roster: the lasting public key of every site.

    Every `take_…` raises SecureSumError for a message that is not what it should be, with nothing changed; every other
    call, where fewer sites than the threshold are left.
    """

    def __init__(self, session: Session, roster: Mapping[str, Ed25519PublicKey]) -> None:
        self.session = session
        self._roster = [roster[name] for name in session.sites]
        self._announced: dict[int, bytes] = {}
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._commitments: dict[int, bytes] = {}
        self._signed: dict[int, bytes] = {}
        self._opened: dict[int, dict[int, bytes]] = {}
        self._masked: set[int] = set()
        self._total: Integers = np.zeros(session.values, number_type(session.bits))
        self._closed = 0

    def take_announced(self, site: str, message: bytes) -> None:
        """Phase 1: a site's keys."""
        place = self._from(site, 0, self._announced)
        parts = split_message(message, (2 * KEY_BYTES, SIGNATURE_BYTES), f"what site {site!r} announces")
        signed = keys_signed(self.session, place, parts[0])
        check_signature(self._roster[place], parts[1], signed, f"what site {site!r} announces")
        self._announced[place] = message

    def announced(self) -> bytes:
        """What every site of phase 1 is sent: all keys."""
        self._close(1, self._announced, "announced their keys")
        return put_by_site(self._announced)

    def take_shares(self, site: str, message: bytes) -> None:
        """Phase 2: a site's sealed shares for all others."""
        place = self._from(site, 1, self._sealed, self._announced)
        found = take_by_site(message[COMMITMENT_BYTES:], SEALED_BYTES, self.session, f"the shares of site {site!r}")
        if found.keys() != self._announced.keys() - {place}:
            raise SecureSumError(f"site {site!r} has not sealed a share for every other site, and for nobody else")
        self._commitments[place], self._sealed[place] = message[:COMMITMENT_BYTES], found

    def sealed_for(self, site: str) -> bytes:
        """What a site of phase 2 is sent: the shares that are sealed for it."""
        self._close(2, self._sealed, "shared their secrets")
        place = self.session.place(site)
        return put_by_site({other: sealed[place] for other, sealed in self._sealed.items() if other != place})

    def take_masked(self, site: str, message: bytes) -> None:
        """Phase 3: a site's vector under masks. It is added at once, and not kept."""
        place = self._from(site, 2, self._masked, self._sealed)
        what = f"the masked vector of site {site!r}"
        self._total += unpack_vector(message, self.session.values, self.session.bits, what)
        self._masked.add(place)

    def present(self) -> bytes:
        """What every site of phase 3 is sent: who has sent a vector."""
        self._close(3, self._masked, "sent their vectors")
        return put_list(self._masked, self.session)

    def take_agreed(self, site: str, message: bytes) -> None:
        """Phase 4: a site's signature under the list."""
        place = self._from(site, 3, self._signed, self._masked)
        signed = list_signed(self.session, put_list(self._masked, self.session))
        what = f"the list of sites, as site {site!r} sends it,"
        split_message(message, (SIGNATURE_BYTES,), what)
        check_signature(self._roster[place], message, signed, what)
        self._signed[place] = message

    def agreed(self) -> bytes:
        """What every site of phase 4 is sent: the signatures."""
        self._close(4, self._signed, "signed the list")
        return put_by_site(self._signed)

    def take_opened(self, site: str, message: bytes) -> None:
        """Phase 5: a site's shares, one of every site that shared its secrets."""
        place = self._from(site, 4, self._opened, self._signed)
        owners = sorted(self._sealed)
        parts = split_message(message, [SHARE_BYTES] * len(owners), f"what site {site!r} opens")
        self._opened[place] = dict(zip(owners, parts, strict=True))

    def total(self) -> tuple[Integers, tuple[str, ...], tuple[str, ...]]:
        """(the sum modulo 2^bits, whose vectors it is of, whose shares were wrong).

        The shares of a site that lies are made up for by others, where more than the threshold have opened theirs.
        """
        self._close(5, self._opened, "opened their shares")
        opening, total = Opening(self.session), self._total
        for owner in sorted(self._sealed):
            shares = {helper: held[owner] for helper, held in self._opened.items()}
            if owner in self._masked:
                add_mask(total, self._own_mask(opening, owner, shares), self.session, subtract=True)
            else:
                self._remove_pairs(total, owner, self._masking_key(opening, owner, shares))
        total &= total.dtype.type(2**self.session.bits - 1)
        named = (tuple(self.session.sites[place] for place in sorted(some)) for some in (self._masked, opening.liars))
        summed, liars = named
        return total, summed, liars

    def _own_mask(self, opening: Opening, owner: int, shares: Mapping[int, bytes]) -> bytes:
        """The secret of the mask that a site had for itself."""
        said = self._commitments[owner]
        return opening.secret(owner, shares, lambda seed: commitment(self.session, owner, seed) == said)

    def _masking_key(self, opening: Opening, owner: int, shares: Mapping[int, bytes]) -> bytes:
        """The private key of the masks that a site that vanished had with others."""
        public = self._masking_public(owner)
        return opening.secret(owner, shares, lambda private: public_of(private) == public)

    def _masking_public(self, place: int) -> bytes:
        return self._announced[place][KEY_BYTES : 2 * KEY_BYTES]

    def _remove_pairs(self, total: Integers, gone: int, private: bytes) -> None:
        """Take away what the sites that are there have added for one that vanished."""
        for place in sorted(self._masked):
            shared = agree(private, self._masking_public(place))
            add_mask(total, shared, self.session, subtract=gone > place)

    def _from(self, site: str, closed: int, seen: Collection[int], before: Collection[int] | None = None) -> int:
        """The place of a site that may speak in this phase, and has not yet."""
        place = self.session.place(site)
        if self._closed != closed or place in seen or (before is not None and place not in before):
            raise SecureSumError(
                f"site {site!r} speaks out of turn: too late or too early, twice, or after it was silent in the phase "
                "before"
            )
        return place

    def _close(self, phase: int, there: Collection[int], what: str) -> None:
        if self._closed < phase - 1:
            raise SecureSumError(f"phase {phase} of a secure sum cannot end before phase {phase - 1} has")
        if len(there) < self.session.threshold:
            gone = [name for place, name in enumerate(self.session.sites) if place not in there]
            raise SecureSumError(
                f"only {len(there)} of {len(self.session.sites)} sites have {what}, {self.session.threshold} are "
                f"needed; not {', '.join(gone)}"
            )
        self._closed = max(self._closed, phase)
