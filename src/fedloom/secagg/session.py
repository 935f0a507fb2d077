"""What a secure sum is about: whose vectors, in which round, of how many values, and how many sites must stay."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from fedloom.errors import SecureSumError

MOST_SITES = 1000
"""Sites of one sum: each seals shares for every other one. More are a tree of sums."""
MOST_BITS = 32
NONCE_BYTES = 16


@dataclass(frozen=True)
class Session:
    """One sum, as every site is told of it. Whatever is signed or sealed is bound to all of it by `digest`.

    job, round: of the run. nonce: 16 fresh bytes of the server's, so that no two sums are the same. sites: by name, in
    order. threshold: sites that must stay to the end. values: length of a vector, of integers modulo 2^bits.
    Raises SecureSumError where these do not go together.
    """

    job: str
    round: int
    nonce: bytes
    sites: tuple[str, ...]
    threshold: int
    values: int
    bits: int

    def __post_init__(self) -> None:
        count = len(self.sites)
        if list(self.sites) != sorted(set(self.sites)):
            raise SecureSumError("the sites of a secure sum must be in order, and each named once")
        if not 2 <= count <= MOST_SITES:
            raise SecureSumError(f"a secure sum of {count} sites: expected 2 to {MOST_SITES}")
        if not count // 2 < self.threshold <= count:
            raise SecureSumError(
                f"a secure sum of {count} sites with a threshold of {self.threshold}: expected {count // 2 + 1} to "
                f"{count}; at half of the sites or fewer, a server could open two different sums"
            )
        if len(self.nonce) != NONCE_BYTES or self.values < 1 or not 1 <= self.bits <= MOST_BITS:
            raise SecureSumError(
                f"a secure sum of {self.values} values of {self.bits} bits with a nonce of {len(self.nonce)} bytes: "
                f"expected at least 1 value, 1 to {MOST_BITS} bits, {NONCE_BYTES} bytes"
            )

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that stand for all of it."""
        numbers = (self.round, self.threshold, self.values, self.bits)
        return hash_parts(b"session", self.nonce, *(str(part).encode() for part in (self.job, *numbers, *self.sites)))

    @property
    def tolerates(self) -> int:
        """Sites that may work together with a lying server, and the others' vectors stay hidden (their theorem 6.5)."""
        return 2 * self.threshold - len(self.sites) - 1

    def place(self, site: str) -> int:
        """The number of a site, from 0. Raises SecureSumError for one that is not of this sum."""
        if site not in self.sites:
            raise SecureSumError(f"site {site!r} is not of this secure sum: its sites are {', '.join(self.sites)}")
        return self.sites.index(site)


def least_threshold(sites: int) -> int:
    """More than two thirds: what a third of the sites, even together with a lying server, cannot go below."""
    return 2 * sites // 3 + 1


def hash_parts(kind: bytes, *parts: bytes) -> bytes:
    """32 bytes for parts of one kind; no other kind or division into parts has the same."""
    hasher = hashlib.sha256(b"fedloom secure sum\x00" + kind + b"\x00")
    for part in parts:
        hasher.update(len(part).to_bytes(8, "big") + part)
    return hasher.digest()
