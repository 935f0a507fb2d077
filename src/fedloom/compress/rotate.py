"""Orthonormal directions that two parties draw alike from a seed: random signs, then a Hadamard transform.

A vector of n numbers is cut into blocks of `BLOCK` and, at its end, of smaller powers of two. Every block is multiplied
by seeded signs (`masks.seeded_signs`) and by the Hadamard matrix of its size over the root of that size: its numbers
become coordinates along orthonormal directions, each of which is as large in every element (the "fast
Johnson–Lindenstrauss transform", Ailon and Chazelle, STOC 2006). Of two numbers at a time sum and difference are taken,
in an order that is written down here, so that every machine has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fedloom.compress.masks import seeded_signs

BLOCK = 4096
"""Elements of a block: twelve sums a number, and a quarter of it fits in the nearest cache."""


def rotate(flat: Tensor, seed: int) -> Tensor:
    """The coordinates of a float32 vector (n,) along the directions of a seed, (n,)."""
    return _transform(flat * seeded_signs(flat.numel(), seed))


def rotate_back(coordinates: Tensor, seed: int) -> Tensor:
    """The vector of these coordinates: what `rotate` was given, but for rounding."""
    return _transform(coordinates.clone()).mul_(seeded_signs(coordinates.numel(), seed))


def _transform(vector: Tensor) -> Tensor:
    """Every block times its Hadamard matrix, over the root of its size; in place. It is its own inverse."""
    for block in _blocks(vector):
        size, width = block.shape[1], 1
        while width < size:
            pairs = block.view(block.shape[0], -1, 2, width)
            first, second = pairs[:, :, 0].clone(), pairs[:, :, 1]
            pairs[:, :, 0] += second
            pairs[:, :, 1] = first.sub_(second)
            width *= 2
        block *= size**-0.5
    return vector


def _blocks(vector: Tensor) -> Iterator[Tensor]:
    """Views of the vector, (number of blocks, size): all those of `BLOCK`, then one of each smaller power of two."""
    begin, size = 0, BLOCK
    while size:
        number = (vector.numel() - begin) // size
        if number:
            yield vector[begin : begin + number * size].view(number, size)
            begin += number * size
        size //= 2
