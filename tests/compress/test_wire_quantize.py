"""Rounding of values: each kind against a slow twin, bounds of the error, and what is refused."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedloom.compress.entries import Quantized, floats
from fedloom.compress.quantize import VALUE_KINDS, quantize
from fedloom.errors import ConfigError, NumericError

INTEGERS = [kind for kind in VALUE_KINDS if kind.startswith("int")]
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.lists(FINITE, max_size=300))
@example([2.0**-149])
def test_nearest_blocks_are_those_of_a_slow_twin(values):
    tensor = torch.tensor(values, dtype=torch.float32)
    for kind, block, top in (("int8", 1024, 127), ("int4", 128, 7)):
        coded = quantize(kind)(tensor, 0)
        assert isinstance(coded, Quantized)
        for start in range(0, len(values), block):
            scale = coded.scales[start // block]
            part = tensor[start : start + block]
            assert scale.bfloat16().float() == scale
            assert part.abs().max().double() <= top * scale.double() * (1 + 1e-6)
            below = torch.nextafter(scale.bfloat16(), torch.tensor(-1.0).bfloat16()).float()
            assert scale == 0 or below * top <= part.abs().max() * (1 + 1e-6)
            expected = [0 if scale == 0 else round(float(v / scale)) for v in part]
            assert coded.codes[start : start + block].tolist() == [min(max(c, -top), top) for c in expected]


@given(st.lists(FINITE, min_size=1, max_size=2100))
def test_signs_carry_the_mean_magnitude_of_their_block(values):
    tensor = torch.tensor(values, dtype=torch.float32)
    coded = quantize("sign")(tensor, 0)
    assert isinstance(coded, Quantized) and coded.bits == 1
    assert coded.codes.tolist() == [-1 if value < 0 else 1 for value in tensor.tolist()]
    for number, scale in enumerate(coded.scales.tolist()):
        part = tensor[1024 * number : 1024 * (number + 1)].double().abs()
        assert scale == pytest.approx(part.mean().item(), rel=2**-8, abs=1e-38)


@pytest.mark.parametrize("kind", [kind for kind in INTEGERS if kind.endswith("stochastic")])
def test_stochastic_rounding_is_unbiased_and_seeded(kind):
    values = torch.linspace(-1, 1, 401)
    repeats = 400
    drawn = torch.stack([floats(quantize(kind)(values, seed)) for seed in range(repeats)])
    step = quantize(kind)(values, 0).scales.max().item()
    assert (drawn.mean(0) - values).abs().max() < 5 * 0.5 * step / math.sqrt(repeats)
    assert (drawn - values).abs().max() < step * (1 + 1e-5)
    assert torch.equal(drawn[3], floats(quantize(kind)(values, 3)))
    assert not torch.equal(drawn[3], drawn[4])


def test_sent_and_residual_add_up_exactly():
    """Error feedback needs input - sent to be a float32 number wherever a code is near its value."""
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    for kind in ("fp32", "bf16", "fp16", "int8"):
        sent = floats(quantize(kind)(values, 7))
        assert torch.equal(sent + (values - sent), values)


def test_block_values_of_zero_and_of_the_smallest_number():
    for kind in INTEGERS:
        assert floats(quantize(kind)(torch.zeros(200), 1)).count_nonzero() == 0
        tiny = torch.full((3,), 1.4e-45)
        assert floats(quantize(kind)(tiny, 1)).isfinite().all()
        assert quantize(kind)(torch.empty(0), 1).numel() == 0


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_integers_cannot_hold_what_is_not_finite(kind, bad):
    with pytest.raises(NumericError, match="diverged"):
        quantize(kind)(torch.tensor([1.0, bad]), 0)


def test_what_else_is_refused():
    with pytest.raises(NumericError, match="fp16 cannot hold"):
        quantize("fp16")(torch.tensor([70000.0]), 0)
    with pytest.raises(ConfigError, match="expected one of fp32, bf16"):
        quantize("int7")(torch.zeros(1), 0)
