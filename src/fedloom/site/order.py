"""The site's own seed for its training: which examples come first is not for the server to say or to know.

The server chooses the seed of a run. If the order of examples followed from that alone, it could walk through a site's
data, one chosen example a job. So the seed of a round's training comes from a secret that never leaves the site. It is
the same for the same job and round, so that a request that is repeated after a crash trains the same bits again.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from fedloom.errors import SiteError

FILE = "order.key"
SIZE = 32
"""Bytes of the secret: 256 bits cannot be guessed."""


def own_seed(folder: Path, job: str, round: int) -> int:
    """A 63-bit seed for a round of a job, from the secret in the site's state folder."""
    label = f"training order\0{job}\0{round}".encode()
    return int.from_bytes(hmac.digest(_secret(folder / FILE), label, hashlib.sha256)[:8], "little") >> 1


def _secret(path: Path) -> bytes:
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
