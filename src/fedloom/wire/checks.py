"""What an entry must be before it is encoded: a sender's mistake is told to the sender."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.compress.entries import Dense, Entry, Quantized, Seeded, Sparse, Values, count
from fedloom.compress.masks import seeded_count, threshold
from fedloom.errors import ConfigError, WireError
from fedloom.wire.index import MOST_DIMENSIONS, MOST_NAME, is_too_large
from fedloom.wire.values import MOST_BLOCK, check_scales, coding_of


def check_entry(name: str, entry: Entry) -> None:
    """Raises WireError, which names the entry, unless the format can carry it."""
    try:
        length = len(name.encode())
        if length > MOST_NAME:
            raise WireError(f"its name has {length} bytes: expected at most {MOST_NAME}")
        if len(entry.shape) > MOST_DIMENSIONS or is_too_large(entry.shape) or min(entry.shape, default=0) < 0:
            raise WireError(
                f"its shape is {entry.shape}: expected at most {MOST_DIMENSIONS} sizes, fewer than 2^31 elements"
            )
        _check_values(entry.values)
        next(check for form, check in _FORMS.items() if isinstance(entry, form))(entry)
    except (WireError, ConfigError, UnicodeEncodeError) as error:
        raise WireError(f"entry {name!r} cannot be sent: {error}") from error


def _check_values(values: Values) -> None:
    coding = coding_of(values)
    if not isinstance(values, Quantized):
        if values.dim() != 1:
            raise WireError(f"its values have {values.dim()} dimensions: expected 1")
        return
    if not 1 <= values.block <= MOST_BLOCK:
        raise WireError(f"its blocks have {values.block} values: expected 1 to {MOST_BLOCK}")
    codes, scales = values.codes, values.scales
    if codes.dtype != torch.int8 or scales.dtype != torch.float32 or codes.dim() != 1 or scales.dim() != 1:
        raise WireError("its codes and scales must be 1-D, int8 and float32")
    blocks = -(-codes.numel() // values.block)
    if scales.numel() != blocks:
        raise WireError(f"it has {scales.numel()} scales: expected {blocks}, one for every {values.block} values")
    _check_codes(codes.numpy(), coding.bits)
    check_scales(scales.numpy())


def _check_codes(codes: NDArray[np.int8], bits: int) -> None:
    if bits == 8 or not codes.size:
        return
    # Not by magnitudes: that of -128 is -128 in 8 bits.
    least, most = int(codes.min()), int(codes.max())
    if bits == 4 and (least < -7 or most > 7):
        raise WireError("a 4-bit code is outside -7 to 7")
    # Of -1, 0 and 1 only 0 lacks the lowest bit.
    if bits == 1 and (least < -1 or most > 1 or not int(np.bitwise_and.reduce(codes)) & 1):
        raise WireError("a 1-bit code is neither -1 nor 1")


def _check_dense(entry: Entry) -> None:
    if entry.values.numel() != count(entry.shape):
        raise WireError(f"it has {entry.values.numel()} values for shape {entry.shape}")


def _check_sparse(entry: Entry) -> None:
    assert isinstance(entry, Sparse)
    positions = entry.positions
    if positions.dtype != torch.int64 or positions.dim() != 1 or positions.numel() != entry.values.numel():
        raise WireError(f"its positions must be 1-D int64, one for each of its {entry.values.numel()} values")
    numbers = positions.numpy()
    if not numbers.size:
        return
    if int(numbers[0]) < 0 or int(numbers[-1]) >= count(entry.shape) or not bool((numbers[1:] > numbers[:-1]).all()):
        raise WireError(f"its positions must increase strictly from 0 on, below {count(entry.shape)}")


def _check_seeded(entry: Entry) -> None:
    assert isinstance(entry, Seeded)
    threshold(entry.density)
    if not 0 <= entry.seed < 2**64 or entry.values.numel() > count(entry.shape):
        raise WireError(f"it has {entry.values.numel()} values under seed {entry.seed}: expected a seed below 2^64")


def check_mask(name: str, numel: int, density: float, seed: int, kept: int) -> None:
    """Raises WireError unless the mask of `seed` keeps so many of the tensor's elements; draws a number for each."""
    expected = seeded_count(numel, density, seed)
    if kept != expected:
        raise WireError(f"tensor {name!r} has {kept:,} values, and its mask keeps {expected:,}")


_FORMS = {Dense: _check_dense, Sparse: _check_sparse, Seeded: _check_seeded}
