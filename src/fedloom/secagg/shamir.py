"""Shamir's sharing of a secret of 32 bytes, modulo the least prime above 2^256 (Shamir, CACM 1979)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares 0 … count − 1 of 33 bytes each; any `threshold` of them give the secret, fewer say nothing of it."""
    polynomial = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [evaluate(polynomial, place + 1).to_bytes(SHARE_BYTES, "big") for place in range(count)]


def evaluate(polynomial: Sequence[int], at: int) -> int:
    """Σ c_i atⁱ."""
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * at + coefficient) % PRIME
    return value


def weights(places: Sequence[int], at: int = -1) -> list[int]:
    """What each share of these places counts for in the value at place `at`; the secret lies at place −1."""
    found = []
    for own in places:
        top = bottom = 1
        for other in places:
            if other != own:
                top = top * (at - other) % PRIME
                bottom = bottom * (own - other) % PRIME
        found.append(top * pow(bottom, -1, PRIME) % PRIME)
    return found


def interpolate(shares: Mapping[int, bytes], factors: Sequence[int]) -> int:
    """The value whose `weights` over the same places are `factors`."""
    numbers = (int.from_bytes(share, "big") for share in shares.values())
    return sum(factor * number for factor, number in zip(factors, numbers, strict=True)) % PRIME


def join(shares: Mapping[int, bytes], factors: Sequence[int] | None = None) -> bytes | None:
    """The secret from place → share, as many as the threshold. None where they are of no secret of 32 bytes."""
    value = interpolate(shares, weights(list(shares)) if factors is None else factors)
    return value.to_bytes(SECRET_BYTES, "big") if value < 2 ** (8 * SECRET_BYTES) else None
