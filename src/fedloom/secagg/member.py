"""A site's side of a secure sum. Each phase is one call, in order; a site that fails in one has left the sum.

What is secret is drawn from the system's randomness, lives in this object alone and is of one session. So a site that
was killed in the middle has vanished from the sum, and a site is never in two sums with the same masks.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedloom.errors import SecureSumError
from fedloom.secagg.masks import Integers, add_mask, number_type, pack_vector
from fedloom.secagg.messages import (
    ANNOUNCED_BYTES,
    SEALED_BYTES,
    commitment,
    keys_signed,
    list_signed,
    put_by_site,
    split_message,
    take_by_site,
    take_list,
)
from fedloom.secagg.seals import KEY_BYTES, SIGNATURE_BYTES, agree, check_signature, public_of, seal, unseal
from fedloom.secagg.session import Session
from fedloom.secagg.shamir import SECRET_BYTES, SHARE_BYTES, split

PHASES = ("announce", "share", "mask", "agree", "open")


class Member:
    """One site in one session.

    identity: the site's lasting key; roster: the lasting public key of every site of the session, which must come from
    elsewhere than the server that is not trusted. Raises SecureSumError wherever a message is not what it should be;
    nothing that would harm the site has left it then.
    """

    def __init__(
        self, session: Session, site: str, identity: Ed25519PrivateKey, roster: Mapping[str, Ed25519PublicKey]
    ) -> None:
        missing = [name for name in session.sites if name not in roster]
        if missing:
            raise SecureSumError(f"site {site!r} does not know the keys of {', '.join(missing)}")
        self.session, self.place = session, session.place(site)
        self._identity, self._roster = identity, [roster[name] for name in session.sites]
        self._sealing, self._masking, self._seed = (secrets.token_bytes(SECRET_BYTES) for _ in range(3))
        self._keys: dict[int, tuple[bytes, bytes]] = {}
        self._held: dict[int, tuple[bytes, bytes]] = {}
        self._present = b""
        self._next = 0

    def announce(self) -> bytes:
        """Phase 1: the public keys of this session, signed."""
        self._enter("announce")
        keys = public_of(self._sealing) + public_of(self._masking)
        return keys + self._identity.sign(keys_signed(self.session, self.place, keys))

    def share(self, announced: bytes) -> bytes:
        """Phase 2: everybody's keys → shares of both secrets, sealed for each of the others."""
        self._enter("share")
        self._keys = self._read_keys(announced)
        count = len(self.session.sites)
        masking, seed = (split(secret, self.session.threshold, count) for secret in (self._masking, self._seed))
        content = [masking[place] + seed[place] for place in range(count)]
        self._held[self.place] = content[self.place][:SHARE_BYTES], content[self.place][SHARE_BYTES:]
        sealed = {
            other: seal(agree(self._sealing, keys[0]), self.session, self.place, other, content[other])
            for other, keys in self._keys.items()
            if other != self.place
        }
        return commitment(self.session, self.place, self._seed) + put_by_site(sealed)

    def mask(self, sealed: bytes, vector: Integers) -> bytes:
        """Phase 3: the shares that others sealed for this site, and its vector → the vector under masks.

        vector: `session.values` integers; what counts of them is modulo 2^bits.
        """
        self._enter("mask")
        if vector.shape != (self.session.values,):
            raise SecureSumError(f"a vector of shape {vector.shape}: expected ({self.session.values},)")
        for other, content in take_by_site(sealed, SEALED_BYTES, self.session, "the sealed shares").items():
            if other not in self._keys or other == self.place:
                raise SecureSumError(f"shares of site {self.session.sites[other]!r}, which has announced no keys")
            opened = unseal(agree(self._sealing, self._keys[other][0]), self.session, other, self.place, content)
            self._held[other] = opened[:SHARE_BYTES], opened[SHARE_BYTES:]
        self._need(len(self._held), "have shared their secrets")
        total = vector.astype(number_type(self.session.bits))
        add_mask(total, self._seed, self.session)
        for other in self._held:
            if other != self.place:
                shared = agree(self._masking, self._keys[other][1])
                # The two of a pair use the same mask with opposite signs.
                add_mask(total, shared, self.session, subtract=other < self.place)
        return pack_vector(total, self.session.bits)

    def agree(self, present: bytes) -> bytes:
        """Phase 4: who has sent a masked vector → this site's signature under that list."""
        self._enter("agree")
        there = take_list(present, self.session)
        if self.place not in there or not self._held.keys() >= set(there):
            raise SecureSumError("the server's list of sites leaves this one out, or has some that shared no secrets")
        self._need(len(there), "have sent their vectors")
        self._present = present
        return self._identity.sign(list_signed(self.session, present))

    def open(self, signatures: bytes) -> bytes:
        """Phase 5: the others' signatures → a share of one secret of every site: which one, follows from the list.

        Of a site that is there it is the one of its own mask, of one that vanished the one of the masks that it had
        with others. Both of one site would uncover its vector; the signatures show that nobody is asked otherwise.
        """
        self._enter("open")
        signed = take_by_site(signatures, SIGNATURE_BYTES, self.session, "the signatures")
        there = set(take_list(self._present, self.session))
        if not signed.keys() <= there:
            raise SecureSumError("a signature of a site that is not on the list")
        for other, signature in signed.items():
            what = f"the list of sites, said to be signed by {self.session.sites[other]!r},"
            check_signature(self._roster[other], signature, list_signed(self.session, self._present), what)
        self._need(len(signed), "have signed the list")
        return b"".join(self._held[place][place in there] for place in sorted(self._held))

    def _read_keys(self, announced: bytes) -> dict[int, tuple[bytes, bytes]]:
        found: dict[int, tuple[bytes, bytes]] = {}
        for place, entry in take_by_site(announced, ANNOUNCED_BYTES, self.session, "the announced keys").items():
            sealing, masking, signature = split_message(entry, (KEY_BYTES, KEY_BYTES, SIGNATURE_BYTES), "an entry")
            what = f"the keys of site {self.session.sites[place]!r}"
            check_signature(self._roster[place], signature, keys_signed(self.session, place, sealing + masking), what)
            found[place] = sealing, masking
        if found.get(self.place) != (public_of(self._sealing), public_of(self._masking)):
            raise SecureSumError("the server hands on other keys for this site than it announced")
        self._need(len(found), "have announced their keys")
        return found

    def _need(self, count: int, what: str) -> None:
        if count < self.session.threshold:
            raise SecureSumError(
                f"only {count} of {len(self.session.sites)} sites {what}: {self.session.threshold} are needed"
            )

    def _enter(self, phase: str) -> None:
        if self._next >= len(PHASES) or PHASES[self._next] != phase:
            done = PHASES[self._next - 1] if self._next else "nothing"
            raise SecureSumError(f"asked to {phase} after {done}: a secure sum runs {', '.join(PHASES)}, each once")
        self._next += 1  # before the phase's work: one that fails is not tried again with other content
