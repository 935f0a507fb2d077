"""What a machine's HTTP proxy must not be asked for: what runs on the machine itself, Flower's own processes too."""

from __future__ import annotations

import os

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def exempt_loopback() -> None:
    """Add loopback to NO_PROXY of this process and of those that it starts; the rest of it stays."""
    told = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""  # the order in which httpx looks
    names = [name.strip() for name in told.split(",") if name.strip()]
    value = ",".join([*names, *(name for name in LOOPBACK if name not in names)])
    os.environ.update(no_proxy=value, NO_PROXY=value)
