"""The site's own seed for its training: which examples come first is not for the server to say or to know.

The server chooses the seed of a run. If the order of examples followed from that alone, it could walk through a site's
data, one chosen example a job. So the seed of a round's training comes from a secret that never leaves the site. It is
the same for the same job and round, so that a request that is repeated after a crash trains the same bits again.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from fedloom.noise.secret import keep_secret

FILE = "order.key"


def own_seed(folder: Path, job: str, round: int) -> int:
    """A 63-bit seed for a round of a job, from the secret in the site's state folder."""
    label = f"training order\0{job}\0{round}".encode()
    return int.from_bytes(hmac.digest(keep_secret(folder / FILE), label, hashlib.sha256)[:8], "little") >> 1
