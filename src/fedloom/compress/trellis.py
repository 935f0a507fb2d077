"""Values in a fraction of a bit each: a path through a trellis, every node of which stands for values of its own.

A node is the last `MEMORY` bits of a stream, and has a fixed row of numbers that are spread like a normal law. So k new
bits name V more values, and the values of a whole stream follow from its bits by a table alone. Which stream comes
nearest to given values the Viterbi algorithm says (Viterbi and Omura, IEEE IT 1974; rows computed from a hash, as in
QTIP, arXiv 2406.11235). A scalar code cannot do this below a bit a value: it has to leave most of them out.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.compress.fast import compiling_pays
from fedloom.errors import WireError

Floats = NDArray[np.float32]
Bits = NDArray[np.uint8]

MEMORY = 8
"""Bits of a node. Two more would lose 2 % less of the values and take four times as long."""

_NODES = 1 << MEMORY
_STREAMS = 16  # are searched side by side; values are cut in as many, or more where they are many
_SHORTEST, _LONGEST = 64, 4096  # steps of a stream: a start costs little then, and a search takes 8 MiB


@dataclass(frozen=True, slots=True)
class Rate:
    """bits that name so many values; what they lose of normal values, as a share of the squared norm (measured)."""

    bits: int
    values: int
    lost: float

    @property
    def per_value(self) -> float:
        """Bits of a value."""
        return self.bits / self.values

    def streams(self, numel: int) -> tuple[int, int]:
        """(streams, steps of each) that so many values are cut in."""
        steps = -(-numel // self.values)
        streams = max(1, min(steps // _SHORTEST, max(_STREAMS, -(-steps // _LONGEST))))
        return streams, -(-steps // streams)

    def size(self, numel: int) -> int:
        """Bits that so many values take."""
        streams, steps = self.streams(numel)
        return streams * steps * self.bits


RATES = (
    Rate(1, 8, 0.866),
    Rate(1, 4, 0.749),
    Rate(1, 2, 0.555),
    Rate(1, 1, 0.299),
    Rate(2, 1, 0.089),
    Rate(3, 1, 0.026),
)
"""In rising order of bits."""


@cache
def rows(values: int) -> Floats:
    """The numbers of every node, (nodes, values): in each column the same quantiles of a normal law, shuffled.

    In steps of 1/1024, so that no two machines differ in the last digit of a logarithm.
    """
    law = NormalDist()
    quantiles = np.array([round(1024 * law.inv_cdf((node + 0.5) / _NODES)) for node in range(_NODES)])
    drawn = hashlib.shake_128(f"fedloom trellis {MEMORY} {values}".encode()).digest(8 * _NODES * values)
    order = np.frombuffer(drawn, "<u8").reshape(_NODES, values).argsort(axis=0, kind="stable")
    made: Floats = quantiles[order].astype(np.float32) / np.float32(1024.0)
    made.setflags(write=False)
    return made


def trace(values: Floats, rate: Rate) -> Bits:
    """The bits, one a byte, whose `follow` is nearest to values of variance 1; step by step within a stream."""
    streams, steps = rate.streams(values.size)
    padded = np.zeros(streams * steps * rate.values, np.float32)
    padded[: values.size] = values
    wanted = padded.reshape(streams, steps, rate.values)
    return np.concatenate([_search(wanted[some : some + _STREAMS], rate) for some in range(0, streams, _STREAMS)])


def _search(wanted: Floats, rate: Rate) -> Bits:
    """The bits of streams whose values are wanted: (streams, steps, values).

    Sums are taken in one order, whoever takes them, so that the same values have the same bits on every machine.
    """
    # As far from zero as what they stand for is on the mean: the nearest point is shorter than the values.
    table = np.ascontiguousarray(rows(rate.values).T) * np.float32((1.0 - rate.lost) ** 0.5)
    own = _add_up(table * table)
    if compiling_pays(wanted.shape[0] * wanted.shape[1] * _NODES):
        from fedloom.compress.compiled import search_streams

        found = np.empty((*wanted.shape[:2], rate.bits), np.uint8)
        search_streams(wanted, table, own, found)
        return found.reshape(-1)
    streams, steps, _ = wanted.shape
    ways = 1 << rate.bits  # that lead into a node: all of its bits but the first were the last ones of another
    cost = np.full((streams, _NODES), np.float32(1e9))
    cost[:, 0] = 0.0  # every stream begins at node 0
    came = np.empty((steps, streams, _NODES // ways), np.uint8)
    for step in range(steps):
        into = cost.reshape(streams, ways, _NODES // ways)
        came[step] = into.argmin(axis=1)
        products = _add_up(wanted[:, step].T[:, :, None] * table[:, None])
        cost = np.repeat(into.min(axis=1), ways, axis=1) + (own - np.float32(2.0) * products)
        cost -= cost.min(axis=1, keepdims=True)
    return _walk_back(cost.argmin(axis=1), came, rate.bits)


def _add_up(terms: Floats) -> Floats:
    """The sum over the first axis, from its beginning to its end."""
    total: Floats = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _walk_back(node: NDArray[Any], came: Bits, bits: int) -> Bits:
    """The bits that lead to each stream's last node; came: which of the ways into a node was taken."""
    steps, streams, heads = came.shape
    new = np.empty((streams, steps, bits), np.uint8)
    each = np.arange(streams)
    for step in range(steps - 1, -1, -1):
        for bit in range(bits):
            new[:, step, bit] = (node >> (bits - 1 - bit)) & 1
        head = node >> bits
        node = head + came[step, each, head].astype(np.int64) * heads
    return new.reshape(-1)


def follow(bits: Bits, rate: Rate, numel: int) -> Floats:
    """The values that bits stand for. Raises WireError where there are not as many bits as that takes."""
    if bits.size != rate.size(numel):
        raise WireError(f"{bits.size} bits of paths do not fit {numel} values: expected {rate.size(numel)}")
    streams, steps = rate.streams(numel)
    taken = bits.reshape(streams, steps, rate.bits)
    words = np.zeros((streams, steps), np.int64)
    for bit in range(rate.bits):
        words = 2 * words + taken[:, :, bit]
    nodes = np.zeros_like(words)
    for back in range(min(steps, -(-MEMORY // rate.bits))):  # a node is its own bits and those of the steps before
        nodes[:, back:] |= words[:, : steps - back] << (back * rate.bits)
    made: Floats = rows(rate.values)[nodes & (_NODES - 1)].reshape(-1)[:numel]
    return made
