"""The rate–distortion bound against closed forms, and codes of a real change beside it."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.distortion import FORMS, Bound, Codings, tables

from toy import random_state


def normal(seed: int, size: int, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal(size)


@pytest.mark.parametrize("lost", [0.8, 0.5, 0.2, 0.05])
def test_the_bound_of_a_normal_law_is_half_a_logarithm(lost: float):
    bound = Bound.of([normal(1, 60_000)])
    assert bound.at(lost) == pytest.approx(0.5 * np.log2(1 / lost), abs=0.02)


def test_the_bound_of_signs_is_one_less_an_entropy():
    """±1 with flips of probability p: an error of 4 p (1 − p) once what is told is shortened, at 1 − h(p) bits."""
    flip = 0.1
    entropy = -flip * np.log2(flip) - (1 - flip) * np.log2(1 - flip)
    signs = np.random.default_rng(2).choice([-1.0, 1.0], 20_000)
    assert Bound.of([signs]).at(4 * flip * (1 - flip)) == pytest.approx(1 - entropy, abs=0.02)


def test_bits_go_to_the_group_that_varies_most():
    """Two normal groups of variances 1 and 1/4: at an error of 1/4 in the first, the second has no bit."""
    bound = Bound.of([normal(3, 40_000), normal(4, 40_000, 0.5)])
    assert bound.at(0.5 / 1.25) == pytest.approx(0.5 * (0.5 * np.log2(4)), abs=0.03)
    assert Bound.of([normal(3, 40_000), np.zeros(40_000)]).at(0.25) == pytest.approx(0.5, abs=0.02)


def test_codes_of_a_change_keep_to_their_bits_and_none_beats_the_bound():
    update = Codings(random_state(1), random_state(2))
    for form in FORMS:
        few, many = (update.code(form, bits) for bits in (5.0, 8.0))
        assert few.bits <= 5.0 and few.bound <= few.bits and many.lost <= few.lost
        assert 0 < few.overhead < few.bits and 0 <= many.lost < 1


def test_a_table_has_a_row_a_form():
    row = {"form": "paths", "asked": 0.3, "bits": 0.29, "overhead": 0.05, "lost": 0.6, "bound": 0.2}
    cells = [
        cell for column in next(tables({"updates": 2, "values": 9, "rows": [row]})).columns for cell in column.cells
    ]
    assert cells == ["paths", "0.3", "0.290", "0.050", "0.600", "0.200", "1.45"]
