"""Coordinates along drawn orthonormal directions: signs, then a Hadamard transform of blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.compress.masks import seeded_signs
from fedloom.compress.rotate import BLOCK, rotate, rotate_back

GOLDEN = [
    "-0x1.0f876c0000000p+1",
    "-0x1.3cc8aa0000000p+2",
    "0x1.6a09e60000000p-1",
    "-0x1.0f876c0000000p+1",
    "-0x1.0f876c0000000p+1",
    "-0x1.0f876c0000000p+1",
    "0x1.0f876c0000000p+1",
    "-0x1.c48c600000000p+1",
    "-0x1.2000000000000p+3",
    "0x1.0000000000000p+0",
    "0x1.0000000000000p+1",
    "0x0.0p+0",
]
"""Of twelve numbers: a block of eight and one of four."""


def vector(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def matrix(size: int) -> np.ndarray:
    """The directions of a vector as rows, by Kronecker products: a slow twin."""
    whole = np.zeros((size, size))
    begin, block = 0, BLOCK
    while block:
        for _ in range((size - begin) // block):
            held = np.ones((1, 1))
            while len(held) < block:
                held = np.kron([[1, 1], [1, -1]], held)
            whole[begin : begin + block, begin : begin + block] = held / np.sqrt(block)
            begin += block
        block //= 2
    return whole


@pytest.mark.parametrize("size", [1, 2, 3, 37, 64, 1000])
def test_coordinates_are_those_of_a_twin_that_multiplies_matrices(size: int):
    flat, signs = vector(size), seeded_signs(size, 5).double().numpy()
    wanted = matrix(size) @ (signs * flat.double().numpy())
    assert np.allclose(rotate(flat, 5).numpy(), wanted, atol=1e-5)


@given(st.integers(0, 3 * BLOCK), st.integers(0, 2**63 - 1))
def test_there_and_back_is_the_vector_and_lengths_stay(size: int, seed: int):
    flat = vector(size, size)
    turned = rotate(flat, seed)
    assert torch.allclose(rotate_back(turned, seed), flat, atol=1e-5)
    assert float(turned.norm()) == pytest.approx(float(flat.norm()), rel=1e-5)


def test_what_is_given_is_left_as_it_is_and_another_seed_has_other_directions():
    flat = vector(100)
    kept = flat.clone()
    turned = rotate(flat, 1)
    held = turned.clone()
    rotate_back(turned, 1)
    assert torch.equal(flat, kept) and torch.equal(turned, held)
    assert not torch.allclose(turned, rotate(flat, 2), atol=0.1)


def test_a_direction_is_as_large_in_every_element_of_its_block():
    one = torch.zeros(BLOCK + 8)
    one[3] = 1.0
    assert torch.allclose(rotate_back(one, 7)[:BLOCK].abs(), torch.full((BLOCK,), BLOCK**-0.5))
    one = torch.zeros(BLOCK + 8)
    one[-1] = 1.0
    found = rotate_back(one, 7)
    assert torch.allclose(found[BLOCK:].abs(), torch.full((8,), 8**-0.5)) and not found[:BLOCK].any()


def test_bits_are_these_on_every_machine():
    found = rotate(torch.arange(12.0) - 5, 11)
    assert [value.hex() for value in found.tolist()] == GOLDEN
