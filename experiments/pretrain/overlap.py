"""How much of a testbed's held-out text the base model has seen."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from fedloom.errors import DataError

GRAM = 8
"""Words in a row; shorter runs are common by chance."""

SPLITS = ("heldout", "validation")
Key = TypeVar("Key", bound=Hashable)


def read_texts(testbed: Path, split: str) -> list[str]:
    """Prompt and completion of all examples of a split. Raises DataError where there are none."""
    files = [*testbed.glob(f"{split}/*.jsonl"), *testbed.glob(f"data/*/{split}.jsonl")]
    rows = [json.loads(line) for path in sorted(files) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows:
        raise DataError(f"{testbed} has no examples of the split {split!r}: python -m experiments data writes them")
    return [row["prompt"] + row["completion"] for row in rows]


def grams(text: str) -> Iterator[str]:
    """All runs of eight words of a text, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    for start in range(len(words) - GRAM + 1):
        yield " ".join(words[start : start + GRAM])


def share_seen(heldout: Sequence[str], corpus: Iterable[str]) -> tuple[int, int]:
    """(runs of eight words of the held-out texts that the corpus has, all of them); each counted once."""
    return shares({"": heldout}, corpus)[""]


def shares(texts: Mapping[Key, Sequence[str]], corpus: Iterable[str]) -> dict[Key, tuple[int, int]]:
    """`share_seen` of several sets of texts, in one pass over the corpus."""
    wanted = {key: {gram for text in some for gram in grams(text)} for key, some in texts.items()}
    union = set().union(*wanted.values())
    seen: set[str] = set()
    for document in corpus:
        seen.update(union.intersection(grams(document)))
    return {key: (len(some & seen), len(some)) for key, some in wanted.items()}
