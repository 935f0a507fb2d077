"""Paths through a trellis: the nearest one is found, its values follow from its bits, and they lose what is said."""

from __future__ import annotations

import hashlib
import importlib.util
from itertools import product

import numpy as np
import pytest

from fedloom.compress import trellis
from fedloom.compress.fast import torch_only
from fedloom.compress.trellis import MEMORY, RATES, Rate, follow, rows, trace
from fedloom.errors import WireError


def normal(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def lost(values: np.ndarray, sent: np.ndarray) -> float:
    """The share of the squared norm, once what is sent has the best length."""
    scale = (values @ sent) / (sent @ sent)
    return float(np.square(values - scale * sent).sum() / np.square(values).sum())


def walk(bits: np.ndarray, rate: Rate, numel: int) -> list[float]:
    """`follow`, one bit after another."""
    streams, steps = rate.streams(numel)
    found: list[float] = []
    for stream in bits.reshape(streams, steps, rate.bits).tolist():
        node = 0
        for step in stream:
            for bit in step:
                node = (2 * node + bit) % (1 << MEMORY)
            found += rows(rate.values)[node].tolist()
    return found[:numel]


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{rate.per_value:g}")
def test_a_path_loses_what_its_rate_says(rate: Rate):
    values = normal(1, 12_000)
    bits = trace(values, rate)
    assert bits.size == rate.size(values.size) <= 1.02 * rate.per_value * values.size + rate.bits
    assert lost(values, follow(bits, rate, values.size)) == pytest.approx(rate.lost, rel=0.05)


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{rate.per_value:g}")
def test_values_follow_bit_by_bit(rate: Rate):
    for numel in (1, 7, 333, 4099):
        bits = np.random.default_rng(numel).integers(0, 2, rate.size(numel), dtype=np.uint8)
        assert follow(bits, rate, numel).tolist() == walk(bits, rate, numel)


def test_no_other_path_is_nearer():
    for rate, numel in ((RATES[2], 16), (RATES[3], 9), (RATES[4], 5)):
        values = normal(numel, numel)
        best = np.sqrt(1 - rate.lost)
        said = [
            np.square(values - best * follow(np.array(bits, np.uint8), rate, numel)).sum()
            for bits in product((0, 1), repeat=rate.size(numel))
        ]
        found = best * follow(trace(values, rate), rate, numel)
        assert np.square(values - found).sum() == pytest.approx(min(said), rel=1e-5)


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{rate.per_value:g}")
def test_compiled_or_not_and_on_any_machine_the_same_path_is_found(rate: Rate, monkeypatch: pytest.MonkeyPatch):
    values = np.concatenate([normal(3, 9000), np.zeros(600, np.float32), 1e4 * normal(4, 1300)])
    with torch_only():
        plain = trace(values, rate), trace(values[:3], rate)
    assert hashlib.sha256(plain[0].tobytes()).hexdigest()[:16] == TRACED[rate.bits, rate.values]
    if importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed: pip install 'fedloom[fast]'")
    monkeypatch.setattr(trellis, "compiling_pays", lambda elements: elements > 0)
    for found, expected in zip((trace(values, rate), trace(values[:3], rate)), plain, strict=True):
        assert np.array_equal(found, expected)


def test_rows_are_the_same_everywhere():
    """A receiver with other numbers would hold another adapter: these are part of the wire."""
    digests = {values: hashlib.sha256(rows(values).tobytes()).hexdigest()[:16] for values in (1, 2, 4, 8)}
    assert digests == GOLDEN
    for values in (1, 8):
        assert abs(float(rows(values).mean())) < 1e-6 and float(rows(values).var()) == pytest.approx(1.0, abs=0.01)
    assert not rows(2).flags.writeable


def test_another_number_of_bits_is_refused():
    with pytest.raises(WireError, match="expected 100"):
        follow(np.zeros(99, np.uint8), RATES[3], 100)


GOLDEN = {
    1: "f8d5073f89507b50",
    2: "8ec1c100081d8eff",
    4: "e44bc08580eeddd0",
    8: "91251acdc43d78e3",
}

TRACED = {
    (1, 8): "9ee49720fd666fb9",
    (1, 4): "0566827e14992f19",
    (1, 2): "a369f419f3b65ccd",
    (1, 1): "97596a2ebadbcb64",
    (2, 1): "b98cadde543a4018",
    (3, 1): "45d20634359794be",
}
