"""ε of noise on examples: dp-accounting is held to closed forms that know nothing of it."""

import math

import pytest

from fedloom.errors import ConfigError
from fedloom.noise.accounting import (
    SampledNoise,
    example_epsilon,
    example_risk,
    find_noise,
    gaussian_risk,
    merge,
)
from fedloom.site.privacy import epsilon

DELTA = 1e-4


def phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize(("noise", "steps"), [(2.0, 1), (5.0, 20), (20.0, 400)])
def test_without_sampling_it_is_the_gaussian_mechanism_within_one_per_cent(noise, steps):
    found = example_epsilon([SampledNoise(1.0, noise, steps)], DELTA)
    assert found == pytest.approx(epsilon(math.sqrt(steps) / noise, DELTA), rel=0.01)


def test_one_sampled_step_is_the_amplified_gaussian_within_one_per_cent():
    # Removing an example: δ(ε) of (1 − q) N(0, σ²) + q N(1, σ²) against N(0, σ²), whose likelihood ratio is monotone.
    q, sigma, eps = 0.2, 1.0, 0.7
    cut = sigma**2 * math.log((math.exp(eps) - 1 + q) / q) + 0.5
    delta = (1 - q) * phi(-cut / sigma) + q * phi((1 - cut) / sigma) - math.exp(eps) * phi(-cut / sigma)
    assert example_epsilon([SampledNoise(q, sigma, 1)], delta) == pytest.approx(eps, rel=0.01)


def test_many_sampled_steps_come_near_their_central_limit():
    # Bu, Dong, Long & Su, "Deep learning with Gaussian differential privacy", cor. 4.
    q, sigma, steps = 0.01, 1.0, 2000
    mu = q * math.sqrt(steps * (math.exp(sigma**-2) - 1))
    found = example_epsilon([SampledNoise(q, sigma, steps)], DELTA)
    assert epsilon(mu, DELTA) == pytest.approx(found, rel=0.08)


def test_sampling_and_noise_and_steps_each_count_the_right_way():
    worth = example_epsilon([SampledNoise(0.05, 1.0, 100)], DELTA)
    halves = [SampledNoise(0.05, 1.0, 50)] * 2
    assert merge(halves) == (SampledNoise(0.05, 1.0, 100),) and example_epsilon(halves, DELTA) == worth
    other = SampledNoise(0.5, 8.0, 100)
    assert example_epsilon([*halves, other], DELTA) > max(worth, example_epsilon([other], DELTA))
    assert example_epsilon([SampledNoise(0.1, 1.0, 100)], DELTA) > worth > example_epsilon(halves[:1], DELTA)
    assert example_epsilon([SampledNoise(0.05, 2.0, 100)], DELTA) < worth and example_epsilon([], DELTA) == 0


@pytest.mark.parametrize("wanted", [0.5, 8.0])
def test_the_noise_for_an_epsilon_is_the_least(wanted):
    noise = find_noise(wanted, 0.005, 0.1, 50)
    assert example_epsilon([SampledNoise(0.1, noise, 50)], 0.005) <= wanted
    assert example_epsilon([SampledNoise(0.1, 0.99 * noise, 50)], 0.005) > wanted


def test_an_epsilon_that_no_noise_reaches_is_said_so():
    with pytest.raises(ConfigError, match="cannot be kept in 10,000 steps"):
        find_noise(1e-6, 1e-12, 1.0, 10**4)


def test_the_attack_risk_is_that_of_the_gaussian_mechanism():
    mu = 0.5
    exact, found = gaussian_risk(mu), example_risk([SampledNoise(1.0, 10.0, 25)])
    assert exact.advantage == pytest.approx(2 * phi(mu / 2) - 1, rel=1e-6)
    assert exact.hits == pytest.approx(phi(mu - 2.3263479), rel=1e-6)
    assert found.advantage == pytest.approx(exact.advantage, rel=0.01)
    assert found.hits == pytest.approx(exact.hits, rel=0.01)
    assert gaussian_risk(0.0) == example_risk([]) and gaussian_risk(0.0).advantage == 0
