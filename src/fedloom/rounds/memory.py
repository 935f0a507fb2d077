"""Memory that was let go of goes back to the system: what is taken next may be of another size and not fit into it."""

from __future__ import annotations

import ctypes

from fedloom.filed import let_go_of_all

LEAST = 2**23
"""Bytes below which nothing is done: looking through the free memory of a process takes some milliseconds."""

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""glibc's; other C libraries give memory back by themselves, or not at all."""


def give_back(freed: int) -> None:
    """Have free memory returned, where about so many bytes were let go of just now.

    A state is hundreds of tensors, which leave holes in the heap; a payload is one block, which fits in none of them.
    """
    if freed >= LEAST:
        let_go_of_all()
        if _TRIM is not None:
            _TRIM(0)
