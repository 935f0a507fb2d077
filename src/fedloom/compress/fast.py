"""Whether loops over elements are compiled: by numba, where it is installed and worth the half second that it takes.

Wherever there is a compiled loop, there is one of numpy or torch with the same outcome, bit by bit.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

MANY = 2**21
"""Elements of one message from which loading numba pays within a few messages; where it is loaded, it pays at once."""

ENOUGH = 2**25
"""Elements of smaller passes that a process has done without numba, from which loading it pays: as many again wait."""

_hidden = False
_without = 0


def is_hidden() -> bool:
    """Whether `torch_only` hides numba."""
    return _hidden


def compiling_pays(elements: int) -> bool:
    """Whether a pass over so many elements is better compiled, by itself or with others like it before and after."""
    global _without
    if _hidden or not _installed():
        return False
    if elements >= MANY or "numba" in sys.modules:
        return True
    _without += elements
    return _without >= ENOUGH


@contextmanager
def torch_only() -> Iterator[None]:
    """Within this context no thread uses numba, so that the code without it can be measured and tested."""
    global _hidden
    _hidden = True
    try:
        yield
    finally:
        _hidden = False


@cache
def _installed() -> bool:
    # What is compiled reads little-endian words where they lie.
    return importlib.util.find_spec("numba") is not None and sys.byteorder == "little"
