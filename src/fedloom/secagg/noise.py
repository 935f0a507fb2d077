"""Integer noise for a secure sum: every site adds its share before it masks, and nobody knows the whole.

The shares are discrete Gaussians, drawn exactly, with integers alone (Canonne, Kamath & Steinke, arXiv 2004.00010,
alg. 1–3): what a float could give away in its low-order bits is not there. Their sum is as good as a discrete Gaussian
whose variance is the sum of theirs (Kairouz, Liu & Steinke, arXiv 2102.06387). Each share is large enough for as many
sites as must stay: where all stay there is more noise than was asked for, never less. What it is worth, in ε at site
level, says `noise.accounting.summed_cost`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import SecureSumError
from fedloom.noise.stream import SecretStream

Numbers = NDArray[np.int64]
MOST_DEVIATION = 2**24
"""Largest standard deviation of a share, in steps of the grid: squares of what is drawn fit into 63 bits."""


def share_deviation(whole: float, least: int, colluding: int = 0) -> int:
    """The standard deviation of one site's share, in whole steps of the grid, rounded up.

    whole: of the sum's noise, in steps; least: sites that stay at least (`Session.threshold`); colluding: those of them
    that may tell the server their shares, which then hide nothing. Raises SecureSumError where nobody's noise is left,
    or where the grid is too fine for it.
    """
    honest = least - colluding
    if honest < 1:
        raise SecureSumError(f"{colluding} of {least} sites may tell their noise, so that none of it can be relied on")
    share = math.ceil(whole / math.sqrt(honest))
    if not 1 <= share <= MOST_DEVIATION:
        raise SecureSumError(
            f"a share of noise of {whole / math.sqrt(honest):g} steps of the grid: expected up to {MOST_DEVIATION:,}; "
            "take fewer bits, so that the grid is coarser"
        )
    return share


def most_reach(clip_norm: float, step: float, values: int) -> float:
    """The largest norm, in steps, of a vector of norm `clip_norm` on the grid: no value is rounded by a whole step."""
    return clip_norm / step + math.sqrt(values)


def draw_share(values: int, deviation: int, stream: SecretStream | None = None) -> Numbers:
    """Independent discrete Gaussians of this parameter: P(x) ∝ exp(−x² / 2σ²) on the integers.

    stream: where the random bits come from; a key that the system draws, if left out.
    """
    if not 1 <= deviation <= MOST_DEVIATION:
        raise SecureSumError(f"noise of {deviation} steps: expected 1 to {MOST_DEVIATION:,}")
    bits, found = stream or SecretStream(), np.zeros(values, np.int64)
    missing = np.arange(values)
    while missing.size:
        tried = _laplace(bits, deviation, missing.size)
        # exp(−(|y| − σ)² / 2σ²): what a Laplace of scale σ has to be taken with to become a Gaussian.
        apart = (np.abs(tried) - deviation) ** 2
        taken = _chance_exp(bits, apart, 2 * deviation**2)
        found[missing[taken]] = tried[taken]
        missing = missing[~taken]
    return found


def _laplace(bits: SecretStream, scale: int, count: int) -> Numbers:
    """P(x) ∝ exp(−|x| / scale) on the integers."""
    found, missing = np.zeros(count, np.int64), np.arange(count)
    while missing.size:
        low = bits.below(scale, missing.size)
        kept = np.flatnonzero(_chance_exp(bits, low, scale))
        high = _geometric(bits, kept.size)
        size, negative = low[kept] + scale * high, bits.below(2, kept.size) == 1
        once = ~(negative & (size == 0))  # zero has one sign
        found[missing[kept[once]]] = np.where(negative, -size, size)[once]
        missing = np.delete(missing, kept[once])
    return found


def _geometric(bits: SecretStream, count: int) -> Numbers:
    """How often a chance of 1/e comes up before it fails."""
    runs, going = np.zeros(count, np.int64), np.arange(count)
    while going.size:
        going = going[_chance_small(bits, np.ones(going.size, np.int64), 1)]
        runs[going] += 1
    return runs


def _chance_exp(bits: SecretStream, above: Numbers, below: int) -> NDArray[np.bool_]:
    """True with probability exp(−above / below) each; above ≥ 0."""
    whole, rest = np.divmod(above, below)
    holds = _chance_small(bits, rest, below)
    going = np.flatnonzero(holds & (whole > 0))
    # exp(−whole) by as many chances of 1/e.
    enough = _geometric(bits, going.size) >= whole[going]
    holds[going[~enough]] = False
    return holds


def _chance_small(bits: SecretStream, above: Numbers, below: int) -> NDArray[np.bool_]:
    """True with probability exp(−above / below) each, 0 ≤ above ≤ below: von Neumann's, by chances above / (below · k).

    Such a chance is one of above / below and one of 1 / k together.
    """
    odd, going, turn = np.zeros(len(above), bool), np.arange(len(above)), 0
    while going.size:
        turn += 1
        odd[going] = turn % 2 == 1
        up = (bits.below(below, going.size) < above[going]) & (bits.below(turn, going.size) == 0)
        going = going[up]
    return odd
