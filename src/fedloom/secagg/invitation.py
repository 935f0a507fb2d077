"""What the server tells a site to begin a sum: the sites, their lasting keys, and what makes the sum this one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedloom.errors import SecureSumError
from fedloom.secagg.messages import ANNOUNCED_BYTES, COMMITMENT_BYTES, SEALED_BYTES
from fedloom.secagg.seals import KEY_BYTES, SIGNATURE_BYTES
from fedloom.secagg.session import MOST_SITES, NONCE_BYTES, Session
from fedloom.secagg.shamir import SHARE_BYTES

_NUMBER_BYTES = 2
_MOST_NAME = 1024
"""Bytes of a site's name, far above any."""


@dataclass(frozen=True, slots=True)
class Invitation:
    """nonce, threshold: of the session. keys: site → its lasting public key, 32 bytes.

    Job, round and the length of vectors are not told: a site knows them, and takes part in no other sum.
    """

    nonce: bytes
    threshold: int
    keys: Mapping[str, bytes]

    def session(self, job: str, round: int, values: int, bits: int) -> Session:
        """The sum that this invites to."""
        return Session(job, round, self.nonce, tuple(sorted(self.keys)), self.threshold, values, bits)

    def roster(self) -> dict[str, Ed25519PublicKey]:
        """The keys that signatures are checked with."""
        return {site: Ed25519PublicKey.from_public_bytes(key) for site, key in self.keys.items()}

    def write(self) -> bytes:
        """nonce | threshold, 2 bytes | for each site in order: bytes of its name, 2 bytes | name | key."""
        parts = [self.nonce, self.threshold.to_bytes(_NUMBER_BYTES, "big")]
        for site, key in sorted(self.keys.items()):
            name = site.encode(errors="surrogatepass")
            parts += [len(name).to_bytes(_NUMBER_BYTES, "big"), name, key]
        return b"".join(parts)

    @classmethod
    def read(cls, message: bytes) -> Invitation:
        """What `write` wrote. Raises SecureSumError for anything else."""
        begin = NONCE_BYTES + _NUMBER_BYTES
        nonce, threshold = message[:NONCE_BYTES], int.from_bytes(message[NONCE_BYTES:begin], "big")
        keys: dict[str, bytes] = {}
        while begin < len(message) and len(keys) <= MOST_SITES:
            name_at = begin + _NUMBER_BYTES
            key_at = name_at + int.from_bytes(message[begin:name_at], "big")
            begin = key_at + KEY_BYTES
            if key_at - name_at > _MOST_NAME or begin > len(message):
                raise SecureSumError("an invitation to a secure sum ends in the middle of a site")
            keys[_decoded(message[name_at:key_at])] = message[key_at:begin]
        invitation = cls(nonce, threshold, keys)
        if invitation.write() != message:
            raise SecureSumError("an invitation to a secure sum names a site twice, or its sites out of order")
        return invitation


def _decoded(name: bytes) -> str:
    try:
        return name.decode(errors="surrogatepass")
    except UnicodeDecodeError:
        raise SecureSumError("an invitation to a secure sum has a name that is no text") from None


def count_talk(sites: Collection[str]) -> tuple[int, int]:
    """(bytes that one site sends, bytes that it is sent) in a sum of these sites beside its vector, where all stay."""
    count = len(sites)
    up = ANNOUNCED_BYTES + COMMITMENT_BYTES + (count - 1) * (_NUMBER_BYTES + SEALED_BYTES)
    up += SIGNATURE_BYTES + count * SHARE_BYTES
    invited = Invitation(bytes(NONCE_BYTES), 0, dict.fromkeys(sites, bytes(KEY_BYTES))).write()
    by_site = _NUMBER_BYTES * (3 * count - 1) + count * (ANNOUNCED_BYTES + SIGNATURE_BYTES) + (count - 1) * SEALED_BYTES
    return up, len(invited) + by_site + -(-count // 8)
