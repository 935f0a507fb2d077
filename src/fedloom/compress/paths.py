"""A whole adapter as paths through trellises, within a budget of bytes: bits go where they are worth most.

A component of a factor (a row of A, a column of B) has a rate and a scale of its own, in half a byte (`adaptive`); all
components of one rate share a path (`trellis`). With the variance σ² of a component's values times the weights of their
places, a rate that loses the share D of them costs σ² D, and the rates are those at which a bit more is worth the same
everywhere (reverse water-filling).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.compress.adaptive import Coder, Decoder, Encoder, code_number, code_signed
from fedloom.compress.entries import Dense, Entry, count
from fedloom.compress.levels import Coded, Part, Size, code_within
from fedloom.compress.trellis import RATES, Bits, Floats, follow, trace
from fedloom.errors import WireError

Shape = tuple[int, ...]
Codes = NDArray[np.int8]

_LONGEST = 4.0  # `Part.whole`: no component is stretched by more
_FINEST = 2.5  # bits a value above which integer codes are as good, and much quicker
MOST = 1 << 21
"""Values of the largest adapter that paths are sought for, which takes some seconds; a larger one has integer codes."""
_TRIES = 6
_STEPS = 8  # scales in an octave: rounding to the next one changes a component by 4 % at most
_EIGHTHS = np.array([1.0, 1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081], np.float32)


@dataclass(frozen=True, eq=False, slots=True)
class Paths:
    """The codes of an adapter's components, in order of their tensors' names: rates, scales (int8), and all bits.

    The bits of the first rate's path come first. A component of rate 0 is zero.
    """

    rates: Codes
    scales: Codes
    bits: Bits

    def tensors(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """The adapter's tensors, float32, of shapes in order of name. Raises WireError where the codes do not fit."""
        sizes = component_sizes(shapes)
        if not self.rates.size == self.scales.size == sizes.size:
            raise WireError(f"{self.rates.size} rates of components do not fit an adapter of {sizes.size}")
        if self.rates.size and not 0 <= self.rates.min() <= self.rates.max() <= len(RATES):
            raise WireError(f"a rate of a component is none of 0 to {len(RATES)}")
        pieces = [np.zeros(size, np.float32) for size in sizes]
        left = self.bits
        for chosen, rate in enumerate(RATES, 1):
            members = np.flatnonzero(self.rates == chosen)
            if not members.size:
                continue
            numel = int(sizes[members].sum())
            taken, left = left[: rate.size(numel)], left[rate.size(numel) :]
            values = np.split(follow(taken, rate, numel), sizes[members].cumsum()[:-1])
            for member, own in zip(members, values, strict=True):
                pieces[member] = own * scale_of(int(self.scales[member]))
        if left.size:
            raise WireError(f"{left.size} bits of paths are left over")
        return dict(_join_components(shapes, pieces))

    def coded(self, shapes: Mapping[str, Shape]) -> Bits:
        """All of it in bits, one a byte: rates and scales (`adaptive`), filled up to eight, then the paths."""
        coder = Encoder()
        code_components(coder, component_factors(shapes), self.rates.tolist(), self.scales.tolist())
        head = np.unpackbits(np.frombuffer(coder.finish(), np.uint8), bitorder="little")
        return np.concatenate([head, self.bits])

    @classmethod
    def decoded(cls, coded: Bits, shapes: Mapping[str, Shape]) -> Paths:
        """What `coded` made. Raises WireError where the bits are no paths of an adapter of these shapes."""
        factors = component_factors(shapes)
        coder = Decoder(np.packbits(coded, bitorder="little").tobytes())
        unknown = [0] * len(factors)
        rates, scales = code_components(coder, factors, unknown, unknown)
        head = coder.finish()
        if head is None or 8 * len(head) > coded.size:
            raise WireError("the rates and scales of paths are not coded as they should be")
        return cls(rates, scales, coded[8 * len(head) :])


@dataclass(frozen=True, eq=False, slots=True)
class Traced(Dense):
    """A tensor out of an adapter in `paths`; its values are what they say of it, float32."""

    paths: Paths


def scale_of(code: int) -> np.float32:
    """2^(code / 8), the same on every machine."""
    return np.float32(np.ldexp(_EIGHTHS[code % _STEPS], code // _STEPS))


def trace_within(parts: Mapping[str, Part], budget: int, size: Size) -> Coded:
    """The parts as paths whose payload keeps to a budget of bytes; as integer codes where these do better.

    That is where a value has more than some two bits, or the paths cannot travel by themselves (`rounds.joint`).
    """
    parts = dict(sorted(parts.items()))
    elements = sum(part.values.numel() for part in parts.values())
    room = 8 * budget
    if not 0 < elements <= MOST or room > _FINEST * elements:
        return code_within(parts, budget, size)
    components = [component for name, part in parts.items() for component in _components(name, part)]
    bits = room - 8 * _overhead(parts, components, choose_rates(components, room), size)
    for _ in range(_TRIES):
        if bits <= 0:
            break
        entries = _entries(parts, components, choose_rates(components, bits))
        taken = size(entries)
        if taken <= budget:
            return Coded(entries, taken, 0.0)
        if taken > 2 * budget:  # they travel as floats
            break
        bits -= 8 * (taken - budget)
    return code_within(parts, budget, size)


@dataclass(frozen=True, eq=False, slots=True)
class Component:
    """A row of A or a column of B: values, and the weight that all of them have."""

    values: Floats
    weight: float
    whole: bool

    @property
    def worth(self) -> float:
        """The mean of (w x)²."""
        return float(np.square(self.weight * self.values.astype(np.float64)).mean())


def _components(name: str, part: Part) -> Iterator[Component]:
    rows = part.values if name.endswith("/A") else part.values.T
    for values, weight in zip(rows.numpy(), part.weights.flatten().tolist(), strict=True):
        yield Component(np.ascontiguousarray(values, np.float32), weight, part.whole)


def choose_rates(components: Sequence[Component], bits: float) -> Codes:
    """A rate for each component, 0 for none: of those that take no more than so many bits, what loses least."""
    sizes = np.array([component.values.size for component in components])
    worth = sizes * [component.worth for component in components]
    lost = np.array([1.0, *(rate.lost for rate in RATES)])
    cost = np.array([0.0, *(rate.per_value for rate in RATES)])

    def chosen(price: float) -> NDArray[np.intp]:
        best: NDArray[np.intp] = (worth[:, None] * lost + price * sizes[:, None] * cost).argmin(axis=1)
        return best

    def taken(rates: NDArray[np.intp]) -> float:
        return float((sizes * cost[rates]).sum())

    low, high = 0.0, 2.0 * float(worth.max()) + 1e-300
    for _ in range(60):
        price = (low + high) / 2 if low else high / 1e3
        low, high = (price, high) if taken(chosen(price)) > bits else (low, price)
    rates = chosen(high)
    left = bits - taken(rates)
    # What no common price spends goes to single components, first where the next rate gains most.
    above = np.minimum(rates + 1, len(RATES))
    for member in np.argsort(-worth * (lost[rates] - lost[above]), kind="stable"):
        more = sizes[member] * (cost[above[member]] - cost[rates[member]])
        if 0 < more <= left and worth[member]:
            rates[member], left = above[member], left - more
    return rates.astype(np.int8)


def _entries(parts: Mapping[str, Part], components: Sequence[Component], rates: Codes) -> dict[str, Entry]:
    """The parts as paths at these rates."""
    bits: list[Bits] = []
    scales = np.zeros(len(components), np.int8)
    for chosen, rate in enumerate(RATES, 1):
        members = np.flatnonzero(rates == chosen).tolist()
        if not members:
            continue
        held = [components[member] for member in members]
        unit = [one.values / max(float(np.sqrt(np.square(one.values).mean())), 1e-30) for one in held]
        bits.append(trace(np.concatenate(unit), rate))
        numel = sum(one.values.size for one in held)
        said = np.split(follow(bits[-1], rate, numel), np.cumsum([one.values.size for one in held])[:-1])
        for member, one, sent in zip(members, held, said, strict=True):
            scales[member] = _scale(one, sent)
    paths = Paths(rates, scales, np.concatenate(bits) if bits else np.zeros(0, np.uint8))
    shapes = {name: tuple(part.values.shape) for name, part in parts.items()}
    return {name: Traced(shapes[name], tensor.flatten(), paths) for name, tensor in paths.tensors(shapes).items()}


def _scale(component: Component, sent: Floats) -> int:
    """The code of the scale with which `sent` is nearest to the component, or has its whole length in its direction."""
    product, own = float(component.values @ sent), float(sent @ sent)
    if product <= 0.0:
        return -128
    scale = product / own
    if component.whole:
        scale = min(float(component.values @ component.values) / product, _LONGEST * scale)
    return _in_steps(scale)


def _overhead(parts: Mapping[str, Part], components: Sequence[Component], rates: Codes, size: Size) -> int:
    """Bytes of a payload beside the bits of its paths: header, index, and rates and scales, about."""
    lengths = [float(np.sqrt(np.square(one.values.astype(np.float64)).mean())) for one in components]
    scales = np.array([_in_steps(length) if rate else 0 for length, rate in zip(lengths, rates, strict=True)], np.int8)
    shapes = {name: tuple(part.values.shape) for name, part in parts.items()}
    bare = Paths(rates, scales, np.zeros(0, np.uint8))
    return size({name: Traced(shape, torch.zeros(count(shape)), bare) for name, shape in shapes.items()})


def _in_steps(scale: float) -> int:
    """The code of the nearest scale."""
    return max(-128, min(127, round(_STEPS * math.log2(max(scale, 1e-30)))))


def code_components(coder: Coder, factors: str, rates: Sequence[int], scales: Sequence[int]) -> tuple[Codes, Codes]:
    """The rates and scales of components as a coder takes or tells them; a component of rate 0 has no scale.

    factors: A or B for each component. What is coded is given in full; to be told it, give zeros. The scale is coded as
    its difference from the last one of the same rate: a rate is worth its bits in a narrow range of scales alone.
    """
    told_rates, told_scales = np.zeros(len(factors), np.int8), np.zeros(len(factors), np.int8)
    last: dict[int, int] = {}
    before = 0
    for place, (factor, rate, scale) in enumerate(zip(factors, rates, scales, strict=True)):
        rate = code_number(coder, factor, rate, len(RATES))
        if rate:
            near = last.get(rate, before)
            before = last[rate] = near + code_signed(coder, "scale", scale - near, 8)
            if not -128 <= before <= 127:
                raise WireError(f"the scale of a component is {before}: expected -128 to 127")
            told_rates[place], told_scales[place] = rate, before
    return told_rates, told_scales


def component_factors(shapes: Mapping[str, Shape]) -> str:
    """A or B for every component, in order."""
    return "".join("A" * shape[0] if name.endswith("/A") else "B" * shape[1] for name, shape in shapes.items())


def component_sizes(shapes: Mapping[str, Shape]) -> NDArray[np.int64]:
    """Values of every component, in order."""
    ways = [shape if name.endswith("/A") else shape[::-1] for name, shape in shapes.items()]
    return np.array([length for number, length in ways for _ in range(number)], np.int64)


def _join_components(shapes: Mapping[str, Shape], pieces: Sequence[Floats]) -> Iterator[tuple[str, Tensor]]:
    begin = 0
    for name, shape in shapes.items():
        number = shape[0] if name.endswith("/A") else shape[1]
        stacked = torch.from_numpy(np.stack(pieces[begin : begin + number])) if number else torch.zeros(shape)
        begin += number
        yield name, (stacked if name.endswith("/A") else stacked.T).contiguous()
