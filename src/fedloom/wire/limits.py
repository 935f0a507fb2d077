"""What a reader is willing to spend on one payload."""

from __future__ import annotations

from dataclasses import dataclass, replace

FREE_TENSORS, FREE_INDEX, FREE_DRAWN = 2**13, 2**19, 2**24
"""Tensors, bytes of index and numbers drawn for masks that the smallest payload may ask for."""

# Above these amounts every tensor, byte of index and drawn number must be paid for with bytes of payload, so that a few
# bytes never cost seconds. Each of the three rates comes to about 10 µs of a reader's time for a byte of payload.
TENSOR_BYTES = 4
INDEX_PER_BYTE = 8
DRAWN_PER_BYTE = 2**13


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one payload may ask for. Every number in it is compared with these before it is used.

    max_payload: bytes of the payload itself. max_values: elements of all tensors together, zeros included.
    max_tensors: entries. max_bytes: bytes of what decoding returns (positions take 8 each). max_index: bytes
    of the unpacked index. max_drawn: elements of seeded tensors together; a number is drawn for each. For max_tensors,
    max_index and max_drawn, a small payload has lower limits still: see `of_payload`.
    """

    max_payload: int = 2**32
    max_values: int = 2**30
    max_tensors: int = 2**18
    max_bytes: int = 2**34
    max_index: int = 2**26
    max_drawn: int = 2**30

    def of_payload(self, size: int) -> Limits:
        """The limits of a payload of `size` bytes, so that time and memory follow from what was really sent."""
        return replace(
            self,
            max_tensors=min(self.max_tensors, max(FREE_TENSORS, size // TENSOR_BYTES)),
            max_index=min(self.max_index, max(FREE_INDEX, size * INDEX_PER_BYTE)),
            max_drawn=min(self.max_drawn, FREE_DRAWN + size * DRAWN_PER_BYTE),
        )


DEFAULT = Limits()
