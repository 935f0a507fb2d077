"""How much of a testbed's held-out text the base model has seen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

GRAM = 8
"""Words in a row; shorter runs are common by chance."""


def grams(text: str) -> Iterator[str]:
    """All runs of eight words of a text, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    for start in range(len(words) - GRAM + 1):
        yield " ".join(words[start : start + GRAM])


def share_seen(heldout: Sequence[str], corpus: Iterable[str]) -> tuple[int, int]:
    """(runs of eight words of the held-out texts that the corpus has, all of them); each counted once."""
    wanted = {gram for text in heldout for gram in grams(text)}
    seen: set[str] = set()
    for document in corpus:
        seen.update(wanted.intersection(grams(document)))
    return len(seen), len(wanted)
