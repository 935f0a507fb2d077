"""Masks and uniform numbers that two parties draw alike from a seed, so that they never travel.

The generator, in full, all arithmetic modulo 2⁶⁴: word j = mix(seed + (j + 1) · 0x9E3779B97F4A7C15), where mix(z) is
z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB; z ^= z >> 31 (splitmix64). Number i is the
16-bit lane i mod 4, lowest first, of word i // 4; element i of a mask is kept where number i < 65536 · density. Sign i
is bit i mod 64, lowest first, of word i // 64.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.errors import ConfigError

STEPS = 65536
"""A density is a multiple of 1/STEPS."""

_GAMMA = 0x9E3779B97F4A7C15
_WORDS = 16384  # words drawn at a time: 128 KiB, so that every pass stays in the cache
_COUNTS: dict[tuple[int, int, int], int] = {}
"""(numel, threshold, seed) → elements kept, of masks drawn before: a sender draws a mask that the wire then counts."""
_MOST_COUNTS = 4096  # some tensors of some clients; a few hundred KiB


def seeded_mask(numel: int, density: float, seed: int) -> Tensor:
    """A bool tensor (numel,): each element kept with probability `density`, a multiple of 1/65536 in [0, 1].

    `seed` counts modulo 2⁶⁴. Raises ConfigError for any other density.
    """
    limit = threshold(density)
    mask = torch.empty(numel, dtype=torch.bool)
    out = mask.numpy()
    for start, numbers in _numbers(numel, seed):
        np.less(numbers, limit, out=out[start : start + numbers.size])
    _remember((numel, limit, seed), int(np.count_nonzero(out)))
    return mask


def seeded_count(numel: int, density: float, seed: int) -> int:
    """How many elements `seeded_mask` keeps, counted in pieces, so that the whole mask is never in memory."""
    limit = threshold(density)
    # A mask of none or of all elements needs no numbers.
    if limit in (0, STEPS):
        return numel if limit else 0
    key = (numel, limit, seed)
    known = _COUNTS.get(key)  # asked once: another thread may clear the table
    if known is not None:
        return known
    return _remember(key, sum(int(np.count_nonzero(numbers < limit)) for _, numbers in _numbers(numel, seed)))


def _remember(key: tuple[int, int, int], kept: int) -> int:
    if len(_COUNTS) >= _MOST_COUNTS:
        _COUNTS.clear()
    _COUNTS[key] = kept
    return kept


def seeded_uniform(numel: int, seed: int) -> Tensor:
    """A float32 tensor (numel,) of numbers in (0, 1): (number + ½) / 65536."""
    uniform = torch.empty(numel)
    out = uniform.numpy()
    for start, numbers in _numbers(numel, seed):
        np.add(numbers, np.float32(0.5), out=out[start : start + numbers.size], dtype=np.float32)
    return uniform.mul_(1 / STEPS)


def seeded_signs(numel: int, seed: int) -> Tensor:
    """A float32 tensor (numel,) of −1 and 1: bit i mod 64, lowest first, of word i // 64, where 1 stands for 1."""
    signs = torch.empty(numel)
    out = signs.numpy()
    for start, numbers in _numbers(-(-numel // 16), seed):
        bits = np.unpackbits(numbers.view(np.uint8), bitorder="little")[: numel - 16 * start]
        np.multiply(bits, np.float32(2), out=out[16 * start : 16 * start + bits.size])
    return signs.sub_(1.0)


def nearest_density(density: float) -> float:
    """The density of a mask that is nearest to this one, and above 0."""
    return max(round(density * STEPS), 1) / STEPS


def threshold(density: float) -> int:
    """65536 · density as the integer that it must be."""
    scaled = density * STEPS
    if not (0 <= scaled <= STEPS and scaled == int(scaled)):
        raise ConfigError(f"a mask of density {density} cannot be drawn: expected a multiple of 1/65536 from 0 to 1")
    return int(scaled)


def _numbers(numel: int, seed: int) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    """The first `numel` 16-bit numbers, in pieces that are overwritten by the next: (index of the first, piece)."""
    steps = np.arange(1, min(_WORDS, (numel + 3) // 4) + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    words, spare = np.empty_like(steps), np.empty_like(steps)
    for start in range(0, numel, 4 * _WORDS):
        np.add(steps, np.uint64((seed + start // 4 * _GAMMA) % 2**64), out=words)
        _mix(words, spare)
        lanes = words if words.dtype.newbyteorder("<") == words.dtype else words.astype("<u8")
        yield start, lanes.view("<u2")[: numel - start]


def _mix(words: NDArray[np.uint64], spare: NDArray[np.uint64]) -> None:
    """splitmix64's finaliser, in place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        np.right_shift(words, np.uint64(shift), out=spare)
        np.bitwise_xor(words, spare, out=words)
        if factor is not None:
            np.multiply(words, np.uint64(factor), out=words)
