"""Noise in a secure sum: its distribution, its share where sites vanish, and what it is worth."""

import math

import numpy as np
import pytest

from fedloom.errors import ConfigError, SecureSumError
from fedloom.noise.accounting import concentrated_epsilon, summed_cost
from fedloom.noise.stream import SecretStream
from fedloom.secagg.noise import draw_share, most_reach, share_deviation
from fedloom.site.privacy import epsilon


def chances(deviation, most):
    """P(x) for |x| ≤ most, of a discrete Gaussian."""
    weights = np.exp(-(np.arange(-most, most + 1) ** 2) / (2 * deviation**2))
    wide = np.exp(-(np.arange(-60 * deviation, 60 * deviation + 1) ** 2) / (2 * deviation**2))
    return weights / wide.sum()


def surprise(drawn, expected, most):
    """χ² of the counts of −most … most, all beyond in one cell, and its degrees of freedom."""
    counts = np.bincount(np.clip(drawn + most + 1, 0, 2 * most + 2), minlength=2 * most + 3)
    cells = np.array([(1 - expected.sum()) / 2, *expected, (1 - expected.sum()) / 2]) * len(drawn)
    return float(((counts - cells) ** 2 / cells).sum()), 2 * most + 2


@pytest.mark.parametrize(("deviation", "most", "key"), [(1, 3, 1), (2, 6, 2), (7, 18, 3)])
def test_a_share_is_a_discrete_gaussian(deviation, most, key):
    drawn = draw_share(40_000, deviation, SecretStream(bytes([key]) * 32))
    found, degrees = surprise(drawn, chances(deviation, most), most)
    limit = degrees + 3.1 * math.sqrt(2 * degrees)  # which 0.1 % of keys pass
    assert found < limit
    wider = np.rint(SecretStream(bytes([key]) * 32).normal(40_000) * 1.1 * deviation).astype(int)
    assert surprise(wider, chances(deviation, most), most)[0] > limit


def test_what_is_drawn_follows_from_the_key_alone():
    assert np.array_equal(draw_share(50, 9, SecretStream(b"k" * 32)), draw_share(50, 9, SecretStream(b"k" * 32)))
    assert not np.array_equal(draw_share(50, 9), draw_share(50, 9))
    assert draw_share(0, 3).shape == (0,)


def test_the_sum_has_the_stated_noise_when_all_but_the_threshold_have_vanished():
    share = share_deviation(40.0, least=4)
    assert share == 20 and share_deviation(40.0, 4, colluding=3) == 40 and share_deviation(0.3, 4) == 1
    bits = SecretStream(b"s" * 32)
    for there in (4, 7):
        total = sum(draw_share(20_000, share, bits) for _ in range(there))
        assert total.std() == pytest.approx(20 * math.sqrt(there), rel=0.02)
        assert total.std() > 0.98 * 40


def test_large_shares_are_as_wide_as_they_say():
    most = 2**24
    drawn = draw_share(20_000, most, SecretStream(b"l" * 32))
    assert drawn.std() == pytest.approx(most, rel=0.02) and abs(drawn.mean()) < 4 * most / math.sqrt(20_000)


def test_noise_that_cannot_be_is_refused():
    for wrong in (lambda: share_deviation(1e9, 4), lambda: share_deviation(1.0, 4, colluding=4)):
        with pytest.raises(SecureSumError):
            wrong()
    for deviation in (0, 2**25):
        with pytest.raises(SecureSumError, match="expected 1 to"):
            draw_share(1, deviation)


def test_a_sum_is_worth_what_a_gaussian_is_but_for_the_bounds_on_the_way():
    reach = most_reach(1.0, 1e-3, 900)
    assert reach == 1030.0
    cost = summed_cost(4, 500.0, reach, 900)
    assert cost == pytest.approx(0.5 * (1030 / 1000) ** 2)  # that of the Gaussian mechanism
    exact = epsilon(math.sqrt(2 * cost), 1e-6)
    assert exact < concentrated_epsilon(cost, 1e-6) < 1.15 * exact
    assert concentrated_epsilon(10 * cost, 1e-6) > concentrated_epsilon(cost, 1e-6) > 0 == concentrated_epsilon(0, 1e-6)
    assert summed_cost(4, 0.5, 1.0, 900) > 1.5 * 0.5 * 1.0  # so little noise is not nearly a Gaussian's


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"fedloom\[privacy\]"):
        concentrated_epsilon(1.0, 1e-6)
