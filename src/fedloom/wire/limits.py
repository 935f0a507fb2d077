"""What a reader is willing to allocate for one payload."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one payload may ask for. Every number a sender wrote is held to these before it is used.

    max_payload: bytes of the payload itself. max_values: elements of all tensors together, zeros included.
    max_tensors: entries. max_bytes: bytes of what decoding returns (positions take 8 each). max_index: bytes
    of the unpacked index.
    """

    max_payload: int = 2**32
    max_values: int = 2**30
    max_tensors: int = 2**13
    max_bytes: int = 2**34
    max_index: int = 2**19


DEFAULT = Limits()
