"""The values of all tensors of a message as streams, and back: one table of codings.

Floating-point words are rotated left by one bit, so that the sign leaves the exponent alone in the first byte, and cut
in byte planes, the first byte of all values first: exponents pack well, mantissas hardly. Codes of integers are bytes,
two or eight to a byte, and the scales of their blocks are float32 planes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.compress.entries import Quantized, Values
from fedloom.errors import WireError
from fedloom.wire.streams import Bytes, Sink, Sources

Words = NDArray[Any]
MOST_BLOCK = 65536
"""Values that may share a scale."""
SCALES = MappingProxyType({8: 18, 4: 22, 1: 27})
"""Bits of a code → role of the first of the four streams of their scales."""

_STEP = 65536  # values handled at a time


@dataclass(frozen=True, slots=True)
class ValueCoding:
    """How one form of values travels.

    `planes` streams begin at role `role`, with `plane_bits` bits of every value in each. `put` appends the values of
    tensors to the streams; `get` takes them back, given how many each tensor has and how many of its share a scale.
    `bits` is 0 for plain words, else that of the `Quantized`. output_bytes: what a decoded value takes, in bytes.
    """

    number: int
    name: str
    role: int
    planes: int
    plane_bits: int
    bits: int
    output_bytes: int
    put: Callable[[ValueCoding, Sequence[Values], Mapping[int, Sink]], None]
    get: Callable[[ValueCoding, Sequence[int], Sequence[int], Sources], list[Values]]


@dataclass(frozen=True, eq=False, slots=True)
class Plane:
    """One byte of each of some unsigned words that were rotated left by one bit; the bytes are made when asked for.

    byte: 0 for the least significant.
    """

    words: Words
    byte: int

    @property
    def size(self) -> int:
        """Bytes: as many as there are words."""
        return self.words.size

    def __getitem__(self, part: slice) -> Bytes:
        words = self.words[part]
        # Bit k of a rotated word was bit k - 1, and its lowest was the highest.
        if self.byte:
            whole: Bytes = (words >> words.dtype.type(8 * self.byte - 1)).astype(np.uint8)
            return whole
        low = words.astype(np.uint8) << np.uint8(1)
        high: Bytes = (words >> words.dtype.type(8 * words.dtype.itemsize - 1)).astype(np.uint8)
        return low | high


def put_words(words: Words, role: int, sinks: Mapping[int, Sink]) -> None:
    """Append unsigned words, rotated left by one, to one stream a byte, the most significant first."""
    size = words.dtype.itemsize
    for plane in range(size):
        sinks[role + plane].add(Plane(words, size - 1 - plane))


def get_words(count: int, size: int, role: int, sources: Sources) -> Words:
    """Take `count` words of `size` bytes back."""
    for plane in range(size):
        sources[role + plane].need(count)
    all_words = np.empty(count, dtype=f"=u{size}")
    for start in range(0, count, _STEP):
        part = all_words[start : start + _STEP]
        planes = np.empty((part.size, size), dtype=np.uint8)
        for plane in range(size):
            planes[:, size - 1 - plane] = sources[role + plane].take(part.size)
        rotated = planes.view(f"<u{size}").reshape(-1)
        np.right_shift(rotated, rotated.dtype.type(1), out=part)
        rotated <<= rotated.dtype.type(8 * size - 1)
        part |= rotated
    return all_words


def tensor_of(array: Words) -> Tensor:
    """The tensor that shares an array's memory; of an empty array one that has the strides of any other."""
    tensor = torch.from_numpy(array)
    return tensor if array.size else torch.empty(0, dtype=tensor.dtype)


def _put_floats(coding: ValueCoding, tensors: Sequence[Values], sinks: Mapping[int, Sink]) -> None:
    for values in tensors:
        assert isinstance(values, Tensor)
        signed = values.view({4: torch.int32, 2: torch.int16}[coding.planes])
        put_words(signed.numpy().view(f"=u{coding.planes}"), coding.role, sinks)


def _get_floats(coding: ValueCoding, counts: Sequence[int], blocks: Sequence[int], sources: Sources) -> list[Values]:
    words = get_words(sum(counts), coding.planes, coding.role, sources).view(f"=i{coding.planes}")
    return [tensor_of(part).view(DTYPES[coding.name]) for part in _parts(words, counts)]


def _put_blocks(coding: ValueCoding, tensors: Sequence[Values], sinks: Mapping[int, Sink]) -> None:
    quantized = [values for values in tensors if isinstance(values, Quantized)]
    codes = [values.codes.numpy() for values in quantized]
    # Codes of fewer bits share bytes with those of the next tensor.
    for part in codes if coding.bits == 8 else [np.concatenate(codes)]:
        sinks[coding.role].add(PACK[coding.bits](part))
    put_words(
        np.concatenate([values.scales.numpy() for values in quantized]).view(np.uint32), SCALES[coding.bits], sinks
    )


def _get_blocks(coding: ValueCoding, counts: Sequence[int], blocks: Sequence[int], sources: Sources) -> list[Values]:
    codes = _get_codes(sum(counts), coding, sources)
    numbers = [-(-count // block) for count, block in zip(counts, blocks, strict=True)]
    scales = get_words(sum(numbers), 4, SCALES[coding.bits], sources).view(np.float32)
    check_scales(scales)
    return [
        Quantized(tensor_of(some), tensor_of(their), block, coding.bits)
        for some, their, block in zip(_parts(codes, counts), _parts(scales, numbers), blocks, strict=True)
    ]


def _parts(whole: Words, counts: Sequence[int]) -> list[Words]:
    """One array, cut in pieces of `counts` elements."""
    return [whole[end - count : end] for end, count in zip(accumulate(counts), counts, strict=True)]


def check_scales(scales: NDArray[np.float32]) -> None:
    """Raises WireError unless every scale is a finite number that is not negative."""
    if not bool((np.isfinite(scales) & ~np.signbit(scales)).all()):
        raise WireError("a scale is negative, infinite or NaN")


def _nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Code + 8, two to a byte, the first in the low half; an odd end is filled up with 0."""
    halves = np.zeros(codes.size + codes.size % 2, dtype=np.uint8)
    halves[: codes.size] = codes + np.int8(8)
    return halves[0::2] | halves[1::2] << np.uint8(4)


def _get_codes(count: int, coding: ValueCoding, sources: Sources) -> NDArray[np.int8]:
    source = sources[coding.role]
    source.need((count * coding.bits + 7) // 8)
    codes = np.empty(count, dtype=np.int8)
    for start in range(0, count, _STEP):
        part = codes[start : start + _STEP]
        packed = source.take((part.size * coding.bits + 7) // 8)
        part[:] = UNPACK[coding.bits](packed, part.size)
    return codes


def _from_nibbles(packed: NDArray[np.uint8], count: int) -> NDArray[np.int8]:
    halves = np.empty(2 * packed.size, dtype=np.uint8)
    np.bitwise_and(packed, 15, out=halves[0::2])
    np.right_shift(packed, 4, out=halves[1::2])
    if not halves[:count].all() or halves[count:].any():
        raise WireError("a 4-bit code is outside -7 to 7")
    halves -= 8
    return halves[:count].view(np.int8)


def _bytes(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    return codes.view(np.uint8)


def _from_bytes(packed: NDArray[np.uint8], count: int) -> NDArray[np.int8]:
    return packed.view(np.int8)


def _signs(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """One bit a code, set where it is +1, the first in the lowest bit; the end is filled up with 0."""
    return np.packbits(codes > 0, bitorder="little")


def _from_signs(packed: NDArray[np.uint8], count: int) -> NDArray[np.int8]:
    bits = np.unpackbits(packed, bitorder="little")
    if bits[count:].any():
        raise WireError("bits follow the last sign")
    codes = bits[:count].view(np.int8)
    codes += codes
    codes -= np.int8(1)
    return codes


PACK = MappingProxyType({8: _bytes, 4: _nibbles, 1: _signs})
UNPACK = MappingProxyType({8: _from_bytes, 4: _from_nibbles, 1: _from_signs})
"""Bits of a code → how codes become bytes, and how `count` of them come back."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CODINGS: MappingProxyType[int, ValueCoding] = MappingProxyType(
    {
        coding.number: coding
        for coding in (
            ValueCoding(0, "fp32", 8, 4, 8, 0, 4, _put_floats, _get_floats),
            ValueCoding(1, "bf16", 12, 2, 8, 0, 2, _put_floats, _get_floats),
            ValueCoding(2, "fp16", 14, 2, 8, 0, 2, _put_floats, _get_floats),
            ValueCoding(3, "int8", 16, 1, 8, 8, 1, _put_blocks, _get_blocks),
            ValueCoding(4, "int4", 17, 1, 4, 4, 1, _put_blocks, _get_blocks),
            ValueCoding(5, "sign", 26, 1, 1, 1, 1, _put_blocks, _get_blocks),
        )
    }
)
"""Every coding by its number in the index."""


def coding_of(values: Values) -> ValueCoding:
    """The coding of values in this form. Raises WireError for a form that cannot travel."""
    form = values.bits if isinstance(values, Quantized) else values.dtype
    if form not in _BY_FORM:
        raise WireError(f"values of form {form} cannot travel: expected {', '.join(c.name for c in CODINGS.values())}")
    return _BY_FORM[form]


_BY_FORM = {coding.bits or DTYPES[coding.name]: coding for coding in CODINGS.values()}
