"""Payloads in which not every tensor has a place: those with the most to say keep one element each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedloom.compress.entries import Sparse
from fedloom.compress.sparsify import Quantize


def keep_few(
    entries: Mapping[str, Sparse],
    worth: Mapping[str, float],
    budget: int,
    size_of: Callable[[Mapping[str, Sparse]], int],
    quantize: Quantize,
) -> Mapping[str, Sparse]:
    """The entries of the tensors of greatest worth, as many as a budget of bytes has room for; the others are empty.

    One is kept even where it does not fit: a run whose budget has no room for one is refused before it starts.
    """
    empty = {
        name: Sparse(entry.shape, entry.positions[:0], quantize(entry.positions[:0].float(), 0))
        for name, entry in entries.items()
    }
    ranked = sorted(entries, key=lambda name: (-worth[name], name))

    def kept(number: int) -> Mapping[str, Sparse]:
        chosen = set(ranked[:number])
        return {name: entry if name in chosen else empty[name] for name, entry in entries.items()}

    # So many are known to fit, and one too many not to.
    fits, above = 1, len(ranked)
    while above - fits > 1:
        middle = (fits + above) // 2
        if size_of(kept(middle)) <= budget:
            fits = middle
        else:
            above = middle
    return kept(min(fits, len(ranked)))
