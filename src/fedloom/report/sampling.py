"""Long lists cut to what a page or a picture can show: a run of 2,000 rounds is as quick to read as one of 200."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

MOST = 200
"""Rounds, clients and notes that a page lists, and points that a line of a picture has at most."""


def sample(items: Sequence[Item], most: int = MOST) -> Sequence[Item]:
    """At even distances, the first and the last among them; all where there are no more than `most`."""
    count = len(items)
    if count <= most:
        return items
    return [items[place * (count - 1) // (most - 1)] for place in range(most)]


def say_sampled(what: str, count: int, how: str = "at even distances") -> str:
    """That not all are shown, in words; "" where they are."""
    return f"{MOST} of {count:,} {what} are shown, {how}; the ledger has all of them." if count > MOST else ""
