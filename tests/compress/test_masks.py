"""The seeded mask against a twin in plain integers, and the laws that it obeys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.compress import masks
from fedloom.compress.masks import seeded_count, seeded_mask, seeded_uniform
from fedloom.errors import ConfigError

WORD = 2**64


def number(seed: int, index: int) -> int:
    """Number `index` of the stream of `seed`, straight from the definition."""
    z = (seed + (index // 4 + 1) * 0x9E3779B97F4A7C15) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    z ^= z >> 31
    return (z >> 16 * (index % 4)) & 0xFFFF


def test_the_words_are_those_of_splitmix64():
    # First outputs for seed 0, as published with the reference implementation.
    words = [sum(number(0, 4 * word + lane) << 16 * lane for lane in range(4)) for word in range(3)]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.integers(0, 300), st.integers(0, 65536), st.integers(0, WORD - 1))
def test_the_mask_is_the_definition(numel, steps, seed):
    mask = seeded_mask(numel, steps / 65536, seed)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [number(seed, index) < steps for index in range(numel)]
    assert seeded_count(numel, steps / 65536, seed) == int(mask.sum())


@pytest.mark.parametrize("numel", [65535, 65536, 65537, 200_001])
def test_pieces_join_without_a_seam(numel):
    mask = seeded_mask(numel, 0.25, 11)
    for index in (0, 65533, 65534, numel - 1):
        assert bool(mask[index]) == (number(11, index) < 16384)
    assert torch.equal(seeded_mask(300_000, 0.25, 11)[:numel], mask)


def test_density_and_independence():
    one, other = seeded_mask(1_000_000, 0.25, 1), seeded_mask(1_000_000, 0.25, 2)
    assert abs(one.double().mean().item() - 0.25) < 0.002
    assert abs((one & other).double().mean().item() - 0.0625) < 0.001
    assert not seeded_mask(1000, 0.0, 5).any()
    assert seeded_mask(1000, 1.0, 5).all()


def test_uniform_numbers_are_the_same_stream():
    assert seeded_uniform(10, 9).tolist() == [(number(9, index) + 0.5) / 65536 for index in range(10)]


@pytest.mark.parametrize("density", [0.2, -0.5, 1.5, float("nan")])
def test_other_densities_are_refused(density):
    with pytest.raises(ConfigError, match="multiple of 1/65536"):
        seeded_mask(10, density, 0)


def test_a_count_is_that_of_the_mask_whichever_is_drawn_first(monkeypatch):
    monkeypatch.setattr(masks, "_MOST_COUNTS", 3)
    for seed in range(9):
        counted = masks.seeded_count(1001, 0.25, seed)
        assert counted == int(masks.seeded_mask(1001, 0.25, seed).sum()) == masks.seeded_count(1001, 0.25, seed)
        assert len(masks._COUNTS) <= 3
