"""Small whole numbers in as few bits as they are worth: a coder whose chances follow from what it has coded.

A number is a row of decisions between 0 and 1, each in a context. In a context that has seen so many zeros and ones the
chance of a one is (ones + ½) / (zeros + ones + 1) (Krichevsky and Trofimov, IEEE IT 1981), so that nothing is said
beforehand. The decisions become a number in [0, 1) (Martin, "Range encoding", 1979), with integers alone: every machine
makes the same bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Protocol

_TOP, _BOTTOM = 1 << 32, 1 << 24  # an interval of `_TOP` at first; below `_BOTTOM` it is widened by a byte
_CHANCE = 16  # bits of a chance


class Coder(Protocol):
    """Codes decisions, or tells them."""

    def decide(self, context: Hashable, bit: int) -> int:
        """The decision; `bit` where it is being coded."""
        ...


class _Interval:
    """Where the number lies after the decisions so far: at `low`, `width` wide, in units of 256^-(4 + widened)."""

    def __init__(self) -> None:
        self.low, self.width, self.widened = 0, _TOP, 0
        self._seen: dict[Hashable, list[int]] = defaultdict(lambda: [0, 0])

    def split(self, context: Hashable) -> int:
        """How much of the width is that of a zero."""
        zeros, ones = self._seen[context]
        chance = ((2 * zeros + 1) << _CHANCE) // (2 * (zeros + ones + 1))
        return (self.width >> _CHANCE) * min(max(chance, 1), (1 << _CHANCE) - 1)

    def take(self, context: Hashable, bit: int, zero: int) -> int:
        """Go into the half of a decision; how many bytes the interval was widened by."""
        self._seen[context][bit] += 1
        self.low, self.width = (self.low + zero, self.width - zero) if bit else (self.low, zero)
        by = 0
        while self.width < _BOTTOM:
            self.low, self.width, by = self.low << 8, self.width << 8, by + 1
        self.widened += by
        return by

    def shortest(self) -> bytes:
        """The fewest bytes of which every continuation lies in the interval."""
        size = 4 + self.widened
        for length in range(size + 1):
            unit = 1 << 8 * (size - length)
            first = -(-self.low // unit)
            if (first + 1) * unit <= self.low + self.width:
                return first.to_bytes(length, "big")
        raise AssertionError("an interval is one unit wide at least")


class Encoder:
    """Makes the bytes of decisions."""

    def __init__(self) -> None:
        self._interval = _Interval()

    def decide(self, context: Hashable, bit: int) -> int:
        """Code a decision; returns it."""
        self._interval.take(context, bit, self._interval.split(context))
        return bit

    def finish(self) -> bytes:
        """All decisions; whatever stands behind them is told apart from them."""
        return self._interval.shortest()


class Decoder:
    """Tells the decisions that bytes begin with."""

    def __init__(self, data: bytes) -> None:
        self._interval, self._data = _Interval(), data
        self._code = int.from_bytes(self._bytes(0, 4), "big")

    def _bytes(self, at: int, count: int) -> bytes:
        return self._data[at : at + count].ljust(count, b"\0")

    def decide(self, context: Hashable, bit: int = 0) -> int:
        """The next decision."""
        held = self._interval
        zero = held.split(context)
        told = int(self._code >= zero)
        self._code -= zero if told else 0
        at = 4 + held.widened
        if by := held.take(context, told, zero):
            self._code = (self._code << 8 * by) | int.from_bytes(self._bytes(at, by), "big")
        return told

    def finish(self) -> bytes | None:
        """The bytes that the decisions took; None where `Encoder` had made other ones."""
        taken = self._interval.shortest()
        return taken if self._data.startswith(taken) else None


def code_number(coder: Coder, context: Hashable, number: int, most: int) -> int:
    """A number from 0 to `most`, one after the other: is it this one, or larger?"""
    for smaller in range(most):
        if not coder.decide((context, smaller), int(number > smaller)):
            return smaller
    return most


def code_signed(coder: Coder, context: Hashable, number: int, bits: int) -> int:
    """A number with |number| < 2^bits: how many digits it has, then its sign, then all digits but the first."""
    digits = code_number(coder, (context, "digits"), abs(number).bit_length(), bits)
    if not digits:
        return 0
    sign = coder.decide((context, "sign"), int(number < 0))
    told = 1
    for place in range(digits - 2, -1, -1):
        told = 2 * told + coder.decide((context, digits, place), abs(number) >> place & 1)
    return -told if sign else told
