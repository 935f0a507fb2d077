"""Rounding float32 values to what will travel: a table of kinds, one pure function each.

Integer kinds follow "value = code × scale of its block". A scale is the least bfloat16 number at which the largest
magnitude of the block still fits, so it costs two bytes and the codes use their whole range. The scale of signs is the
mean magnitude of the block, which keeps its L1 norm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.compress.entries import Quantized, Values
from fedloom.compress.masks import seeded_uniform
from fedloom.compress.sparsify import Quantize
from fedloom.errors import ConfigError, NumericError

Rounding = Callable[[Tensor, int], Values]
"""(1-D float32 tensor on the CPU, seed) → values."""


def quantize(kind: str) -> Quantize:
    """The function (values, seed) → the values in the form in which they will travel. Only stochastic kinds use `seed`.

    >>> quantize("int4")(torch.tensor([0.5, -7.0]), 0).dequantize()
    tensor([ 0., -7.])

    Raises ConfigError for an unknown kind; the function raises NumericError where the kind cannot hold a value (no
    integer kind holds infinities or NaN; float16 ends at 65504).
    """
    if kind not in VALUE_KINDS:
        raise ConfigError(f"no value coding is called {kind!r}: expected one of {', '.join(VALUE_KINDS)}")
    return partial(_rounded, VALUE_KINDS[kind])


def _rounded(rounding: Rounding, values: Tensor, seed: int) -> Values:
    return rounding(values.detach().to("cpu", torch.float32).reshape(-1).contiguous(), seed)


def _float32(values: Tensor, seed: int) -> Tensor:
    return values


def _bfloat16(values: Tensor, seed: int) -> Tensor:
    return values.to(torch.bfloat16)


def _float16(values: Tensor, seed: int) -> Tensor:
    rounded = values.to(torch.float16)
    if bool((rounded.isinf() & values.isfinite()).any()):
        raise NumericError(f"fp16 cannot hold a value of {values.abs().max().item():.4g}: use bf16 or fp32 values")
    return rounded


def _blocks(values: Tensor, seed: int, *, bits: int, block: int, stochastic: bool) -> Quantized:
    """Codes in ±(2^(bits−1) − 1), nearest (ties to even) or unbiased: floor(value / scale + u), u uniform in (0, 1)."""
    top = 2 ** (bits - 1) - 1
    count = values.numel()
    if not count:
        return Quantized(torch.empty(0, dtype=torch.int8), torch.empty(0), block, bits)
    parts = np.zeros((-(-count // block), block), dtype=np.float32)  # numpy is much the faster for a few values
    parts.reshape(-1)[:count] = values.numpy()
    peaks = np.maximum(parts.max(axis=1), -parts.min(axis=1))
    if not np.isfinite(peaks).all():
        raise NumericError(f"int{bits} values cannot hold infinities or NaN: the update has diverged")
    # A block that is not zero needs a scale above zero, even where peak / top is below the least float32, 2⁻¹⁴⁹.
    scales = _up_to_bfloat16(np.maximum(peaks / np.float32(top), (peaks > 0) * np.float32(2.0**-149)))
    parts /= np.where(scales > 0, scales, np.float32(1.0))[:, None]
    if stochastic:
        parts += seeded_uniform(parts.size, seed).numpy().reshape(parts.shape)
        np.floor(parts, out=parts)
    else:
        np.rint(parts, out=parts)
    codes = torch.empty(count, dtype=torch.int8)
    codes.numpy()[:] = np.clip(parts, -top, top, out=parts).reshape(-1)[:count]
    return Quantized(codes, torch.from_numpy(scales), block, bits)


def _signs(values: Tensor, seed: int, *, block: int) -> Quantized:
    """±1 times the mean magnitude of the block, as bfloat16; zero counts as positive."""
    flat = values.numpy()
    if not np.isfinite(flat).all():
        raise NumericError("sign values cannot hold infinities or NaN: the update has diverged")
    count, rest = flat.size, flat.size % block
    parts = np.zeros(count + -count % block, dtype=np.float32)
    # Divided before they are summed: the sum of finite numbers need not be finite.
    np.abs(flat, out=parts[:count])
    parts[: count - rest] /= block
    parts[count - rest : count] /= max(rest, 1)
    means = torch.from_numpy(parts).view(-1, block).sum(dim=1).clamp_(max=torch.finfo(torch.bfloat16).max)
    scales = means.to(torch.bfloat16).to(torch.float32)
    codes = (flat >= 0).view(np.int8)
    codes += codes
    codes -= np.int8(1)
    return Quantized(torch.from_numpy(codes), scales, block, 1)


def _up_to_bfloat16(positive: NDArray[np.float32]) -> NDArray[np.float32]:
    """The least bfloat16 numbers that are not below these, as float32."""
    return ((positive.view(np.int32) + np.int32(0xFFFF)) & np.int32(~0xFFFF)).view(np.float32)


VALUE_KINDS: MappingProxyType[str, Rounding] = MappingProxyType(
    {
        "fp32": _float32,
        "bf16": _bfloat16,
        "fp16": _float16,
        "int8": partial(_blocks, bits=8, block=1024, stochastic=False),
        "int4": partial(_blocks, bits=4, block=128, stochastic=False),
        "sign": partial(_signs, block=1024),
        "int8-stochastic": partial(_blocks, bits=8, block=1024, stochastic=True),
        "int4-stochastic": partial(_blocks, bits=4, block=128, stochastic=True),
    }
)
