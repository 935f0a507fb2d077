"""The loops over elements, compiled by numba: see `sparsify`, `marks` and `trellis`, whose numpy gives the same.

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


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def search_streams(wanted: Array, table: Array, own: Array, found: Array) -> None:
    """The bits of the path through the trellis that is nearest to each stream: see `trellis`.

    wanted: (streams, steps, values); table: (values, nodes), what the nodes stand for; own: (nodes,), its squares added
    up; found: (streams, steps, bits), written. All float32, and bits one a byte.
    """
    streams, steps, values = wanted.shape
    nodes, bits = own.size, found.shape[2]
    heads = nodes >> bits
    cost, best = np.empty(nodes, np.float32), np.empty(heads, np.float32)
    product, way = np.empty(nodes, np.float32), np.empty(heads, np.uint8)
    came = np.empty((steps, heads), np.uint8)
    for stream in range(streams):
        cost[:] = np.float32(1e9)
        cost[0] = 0.0
        for step in range(steps):
            best[:] = cost[:heads]
            way[:] = 0
            for w in range(1, nodes // heads):
                for h in range(heads):
                    nearer = cost[w * heads + h] < best[h]
                    best[h] = cost[w * heads + h] if nearer else best[h]
                    way[h] = w if nearer else way[h]
            came[step] = way
            for n in range(nodes):
                product[n] = wanted[stream, step, 0] * table[0, n]
            for v in range(1, values):
                for n in range(nodes):
                    product[n] += wanted[stream, step, v] * table[v, n]
            for n in range(nodes):
                cost[n] = best[n >> bits] + (own[n] - np.float32(2.0) * product[n])
            lowest = cost.min()
            for n in range(nodes):
                cost[n] -= lowest
        node = cost.argmin()
        for step in range(steps - 1, -1, -1):
            for bit in range(bits):
                found[stream, step, bit] = (node >> (bits - 1 - bit)) & 1
            head = node >> bits
            node = head + came[step, head] * heads
