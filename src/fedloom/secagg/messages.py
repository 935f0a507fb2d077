"""The bytes of each phase. All sizes follow from the session, so nothing but numbers of sites and content travels."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedloom.errors import SecureSumError
from fedloom.secagg.seals import KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES
from fedloom.secagg.session import Session, hash_parts
from fedloom.secagg.shamir import SHARE_BYTES

ANNOUNCED_BYTES = 2 * KEY_BYTES + SIGNATURE_BYTES
COMMITMENT_BYTES = 32
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
_PLACE_BYTES = 2


def put_by_site(content: Mapping[int, bytes]) -> bytes:
    """Number of a site and its content, one after another."""
    return b"".join(place.to_bytes(_PLACE_BYTES, "big") + content[place] for place in sorted(content))


def take_by_site(message: bytes, size: int, session: Session, what: str) -> dict[int, bytes]:
    """Number of a site → its content of `size` bytes. Raises SecureSumError for anything that is not just that."""
    step = _PLACE_BYTES + size
    if len(message) % step:
        raise SecureSumError(f"{what}: {len(message)} bytes are no whole number of entries of {step}")
    found: dict[int, bytes] = {}
    last = -1
    for begin in range(0, len(message), step):
        place = int.from_bytes(message[begin : begin + _PLACE_BYTES], "big")
        if not last < place < len(session.sites):
            raise SecureSumError(f"{what}: entry {place} is out of order, or of no site of this sum")
        found[place] = message[begin + _PLACE_BYTES : begin + step]
        last = place
    return found


def put_list(places: Collection[int], session: Session) -> bytes:
    """Who is there, a bit for each site."""
    bits = sum(1 << place for place in places)
    return bits.to_bytes(-(-len(session.sites) // 8), "big")


def take_list(message: bytes, session: Session) -> list[int]:
    """The sites of a list, in order."""
    bits = int.from_bytes(message, "big")
    if len(message) != -(-len(session.sites) // 8) or bits >> len(session.sites):
        raise SecureSumError(f"a list of sites of {len(message)} bytes does not fit {len(session.sites)} sites")
    return [place for place in range(len(session.sites)) if bits >> place & 1]


def split_message(message: bytes, sizes: Collection[int], what: str) -> list[bytes]:
    """The message cut into parts of these sizes."""
    if len(message) != sum(sizes):
        raise SecureSumError(f"{what} has {len(message)} bytes: expected {sum(sizes)}")
    parts, at = [], 0
    for size in sizes:
        parts.append(message[at : at + size])
        at += size
    return parts


def keys_signed(session: Session, place: int, keys: bytes) -> bytes:
    """What a site signs when it announces its keys."""
    return hash_parts(b"keys", session.digest, place.to_bytes(2, "big"), keys)


def list_signed(session: Session, present: bytes) -> bytes:
    """What a site signs when it agrees on who is there."""
    return hash_parts(b"present", session.digest, present)


def commitment(session: Session, place: int, seed: bytes) -> bytes:
    """What a site says of its own mask's secret beforehand, so that wrong shares of it are found."""
    return hash_parts(b"commitment", session.digest, place.to_bytes(2, "big"), seed)
