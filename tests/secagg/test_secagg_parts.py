"""The bricks of a secure sum, each against a slow twin."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import SecureSumError
from fedloom.secagg import Grid
from fedloom.secagg.masks import number_type, pack_vector, packed_size, unpack_vector
from fedloom.secagg.shamir import PRIME, join, split


def test_the_modulus_is_prime():
    """Miller and Rabin's test with the first twelve primes, and a few composites it must find."""

    def passes(number):
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
            value = pow(base, odd, number)
            if value in (1, number - 1):
                continue
            if all((value := value * value % number) != number - 1 for _ in range(twos - 1)):
                return False
        return True

    assert passes(PRIME) and PRIME > 2**256
    assert not passes(PRIME + 2) and not passes(2**256 + 1)


@settings(max_examples=20)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 5), st.integers(0, 3))
def test_any_shares_of_the_threshold_give_the_secret_and_fewer_do_not(secret, threshold, spare):
    shares = split(secret, threshold, threshold + spare)
    for places in itertools.combinations(range(len(shares)), threshold):
        assert join({place: shares[place] for place in places}) == secret
    if threshold > 1:
        assert join({place: shares[place] for place in range(threshold - 1)}) != secret


def test_a_share_alone_says_nothing():
    """With two of two, every secret is as likely for one share: the other share can be chosen to fit any of them."""
    shares = split(bytes(32), 2, 2)
    other = (2 * int.from_bytes(shares[0], "big") - 7) % PRIME  # on the line through (0, 7) and the first share
    assert join({0: shares[0], 1: other.to_bytes(33, "big")}) == (7).to_bytes(32, "big")


@settings(max_examples=40)
@given(st.integers(1, 32), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_packing_keeps_the_lowest_bits(bits, numbers):
    vector = np.array(numbers, np.uint64).astype(number_type(bits))
    packed = pack_vector(vector, bits)
    assert len(packed) == packed_size(len(numbers), bits)
    text = "".join(f"{int(number) & (2**bits - 1):0{bits}b}" for number in vector)
    if bits not in (8, 16, 32):
        assert packed == bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8))
    again = unpack_vector(packed, len(numbers), bits, "it")
    assert again.tolist() == [int(number) & (2**bits - 1) for number in vector]


def test_packing_in_pieces_is_packing_as_a_whole(monkeypatch):
    vector = np.random.default_rng(0).integers(0, 2**13, 1000).astype(np.uint16)
    whole = pack_vector(vector, 13)
    monkeypatch.setattr("fedloom.secagg.masks._CHUNK", 64)
    assert pack_vector(vector, 13) == whole
    assert unpack_vector(whole, 1000, 13, "it").tolist() == vector.tolist()


def test_masks_in_pieces_are_masks_as_a_whole(monkeypatch):
    from fedloom.secagg.masks import add_mask
    from secagg_cohort import session_of

    session, one, two = session_of(3), np.zeros(1000, np.uint32), np.zeros(1000, np.uint32)
    add_mask(one, bytes(32), session)
    monkeypatch.setattr("fedloom.secagg.masks._CHUNK", 64)
    add_mask(two, bytes(32), session)
    assert one.tolist() == two.tolist() and len(set(one.tolist())) > 990
    add_mask(two, bytes(32), session, subtract=True)
    assert not two.any()


@settings(max_examples=30)
@given(st.integers(4, 32), st.integers(1, 6), st.integers(0, 10**6))
def test_a_sum_on_the_grid_never_wraps_and_errs_by_less_than_a_step_a_site(bits, sites, seed):
    if 2 ** (bits - 1) - 1 < sites:
        return
    draw = np.random.default_rng(seed)
    grid = Grid.reaching(3.0, bits, sites)
    values = draw.uniform(-3, 3, (sites, 30))
    kind = number_type(bits)
    total = np.zeros(30, kind)
    for row in values:
        total += grid.to_integers(row, draw)
    assert np.abs(grid.to_values(total) - values.sum(0)).max() <= sites * grid.step * (1 + 1e-9)


def test_rounding_on_the_grid_has_no_bias():
    grid = Grid(1.0, 16, 2)
    draw = np.random.default_rng(0)
    for value in (0.3, -0.7, 5.5, -2.0):
        rounded = grid.to_values(grid.to_integers(np.full(20_000, value), draw))
        # The deviation of the mean of 20,000 draws is below 0.0036; five of them.
        assert abs(rounded.mean() - value) < 0.018
        assert set(rounded.tolist()) <= {np.floor(value), np.floor(value) + 1}


def test_what_is_beyond_the_reach_is_cut():
    grid = Grid(0.5, 8, 3)
    assert grid.most == 42 and grid.reach == 21.0
    sent = grid.to_integers(np.array([1e9, -1e9]), np.random.default_rng(0))
    assert grid.to_values(sent).tolist() == [21.0, -21.0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Grid(1.0, 3, 4), "3 bits cannot hold a sum of 4 sites: expected at least 4"),
        (lambda: Grid(0.0, 8, 2), "a grid of step 0.0"),
        (lambda: Grid(float("inf"), 8, 2), "a grid of step inf"),
        (lambda: Grid(1.0, 8, 2).to_integers(np.array([np.nan]), np.random.default_rng(0)), "NaN or infinity"),
    ],
)
def test_a_grid_that_cannot_hold_its_numbers_is_refused(make, said):
    with pytest.raises(SecureSumError, match=said):
        make()


def test_a_secure_sum_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, fedloom.secagg; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
