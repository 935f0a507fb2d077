"""Seeds: one number fixes everything random in a run, and every purpose has its own."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *labels: str | int) -> int:
    """A 63-bit seed for one purpose, independent of every other label's."""
    text = "\x00".join(str(label) for label in (seed, *labels)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
