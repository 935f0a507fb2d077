"""The loops over elements, compiled by numba: see `sparsify` and `marks`, whose numpy gives the same.

Each is compiled at its first call and cached beside this file or, where that cannot be written, in the user's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def list_reaching(scores: Array, limit: float, positions: Array, reached: Array) -> None:
    """The positions and values of the scores of at least `limit`, in order; one place more than there are of them."""
    n = 0
    for k in range(scores.size):  # without a branch: every score is written, and the next one over it if it is too low
        positions[n] = k
        reached[n] = scores[k]
        n += scores[k] >= limit


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def list_largest(scores: Array, least: float, chosen: Array) -> None:
    """The indices of the largest scores, of which `least` is the lowest, in order; the first ones win ties.

    chosen has one place more than there are of them.
    """
    above = 0
    for k in range(scores.size):
        above += scores[k] > least
    ties, n = chosen.size - 1 - above, 0
    for k in range(scores.size):
        chosen[n] = k
        tie = (scores[k] == least) & (ties > 0)
        ties -= tie
        n += (scores[k] > least) | tie


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def mark(positions: Array, bits: Array, before: Array, ones: Array) -> None:
    """Set the bits at these positions; before[byte]: how many are set in all bytes before it, by the table `ones`."""
    for k in range(positions.size):
        bits[positions[k] >> 3] |= np.uint8(1 << (positions[k] & 7))
    total = 0
    for byte in range(bits.size):
        before[byte] = total
        total += ones[bits[byte]]


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def find_marked(positions: Array, bits: Array, before: Array, ones: Array, found: Array, places: Array) -> int:
    """Of these positions the indices of those that are marked, and after how many other marks; returns how many."""
    n = 0
    for k in range(positions.size):  # without a branch, as above
        byte, bit = positions[k] >> 3, positions[k] & 7
        found[n] = k
        places[n] = before[byte] + ones[bits[byte] & ((1 << bit) - 1)]
        n += (bits[byte] >> bit) & 1
    return n
