"""An audit by canaries: its bound is that of a fair coin where nothing leaks, and below the ε that is stated."""

import math

import pytest

from benchmarks import canaries


def test_guesses_are_of_the_surest_and_right_where_they_agree_with_the_coins():
    scores, there = [5.0, 4.0, 0.1, 0.0, -3.0, -4.0], [True, True, False, True, False, True]
    assert canaries.count_right(scores, there, 4) == 3
    assert canaries.count_right(scores, there, 2) == 1


def test_the_bound_is_that_of_a_binomial_test_where_there_is_no_delta():
    # All of 60 right: e^ε / (1 + e^ε) is at least 0.05^(1/60).
    each = 0.05 ** (1 / 60)
    assert canaries.lower_bound(60, 60, 100, 0.0) == pytest.approx(math.log(each / (1 - each)), rel=1e-6)
    assert canaries.lower_bound(30, 60, 100, 0.0) == 0
    assert 0 < canaries.lower_bound(50, 60, 100, 1e-4) < canaries.lower_bound(50, 60, 100, 0.0)
    assert canaries.chance(55, 60, 100, 1.0, 1e-3) > canaries.chance(55, 60, 100, 1.0, 0.0)
    assert canaries.chance(10, 60, 100, 0.0, 1.0) == 1.0


@pytest.mark.slow
def test_an_attacker_finds_out_less_than_is_stated_and_much_where_there_is_no_noise():
    noisy, bare = canaries.run()["rows"]
    assert noisy["lower_bound"] < noisy["epsilon"] <= 8.0
    assert bare["lower_bound"] > 2.0 and bare["right"] > noisy["right"]
