"""A lasting secret in a file: what is drawn from it comes out the same again after a crash, and nobody else has it."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from fedloom.errors import SiteError

SIZE = 32
"""Bytes of the secret: 256 bits cannot be guessed."""


def keep_secret(path: Path) -> bytes:
    """The secret, made on first use, mode 0600. Raises SiteError where others may read it, or where it was altered."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = path.with_suffix(".partial")
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(secrets.token_bytes(SIZE))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)  # whole or not there: half a secret would be easy to guess
    if path.stat().st_mode & 0o077:
        raise SiteError(f"{path} may be read by others than its owner: chmod 600 {path}")
    content = path.read_bytes()
    if len(content) != SIZE:
        raise SiteError(f"{path} has {len(content)} bytes, expected {SIZE}: delete it, and a new one is made")
    return content


def derive_key(secret: bytes, *about: object) -> bytes:
    """A key for one draw of noise. about: all that what the noise hides depends on, so that no noise ever hides two
    different things: their difference would be bare.
    """
    return hmac.digest(secret, b"noise on examples\0" + repr(about).encode(), hashlib.sha256)
