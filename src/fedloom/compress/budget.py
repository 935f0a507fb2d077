"""From bytes to a density: how many elements of a change a payload has room for.

Every element takes the entropy of whether it is sent, and the bits of a value where it is: that gives a density. What a
payload really takes is told by encoding it, and corrects the next guess. A participant remembers two numbers from its
last payload, so that a later one is mostly encoded once: how its true size compared with the entropy estimate, and what
a tensor takes of which next to nothing is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fedloom.compress.entries import Entry, Quantized
from fedloom.compress.sparsify import Quantize

COST = "cost"
"""The name in a participant's memory of what its last payload took, over the entropy of positions and values."""

LEAST = "least"
"""The name in a participant's memory of what a tensor takes of which one element is sent, in bytes."""

_TRIES = 5
_AIM = 0.99  # of the budget: what is aimed at, since a payload above it is of no use
_USED = 0.95  # of the budget: enough, another encoding would cost more time than it wins bytes

Made = TypeVar("Made", bound=Entry)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a client's payload may take: `share` of the dense fp32 update or, where that is 0, `size` bytes."""

    share: float = 0.0
    size: int = 0

    def bytes(self, values: int) -> float:
        """The bytes of a payload about so many values."""
        return self.share * 4 * values if self.share else self.size

    def __str__(self) -> str:
        """As in a settings file."""
        return f"{100 * self.share:g}%" if self.share else f"{self.size} bytes"


@dataclass(frozen=True, slots=True)
class Room:
    """The bytes of one payload, and what it is to hold: `tensors` tensors of `elements` elements altogether.

    value_bits: of a value that is sent. most: the largest density that is of use. positions: whether they travel; they
    cost nothing where they follow from a seed.
    """

    budget: int
    elements: int
    tensors: int
    value_bits: float
    most: float = 1.0
    positions: bool = True

    def bits(self, density: float) -> float:
        """Bits for an element, sent or not: the entropy of whether it is sent, and its value where it is."""
        if not (self.positions and 0.0 < density < 1.0):
            return density * self.value_bits
        return -density * math.log2(density) - (1 - density) * math.log2(1 - density) + density * self.value_bits

    def density(self, bits: float) -> float:
        """The density at which an element takes so many bits, `most` at most."""
        if bits >= self.bits(self.most):
            return self.most
        # Nothing is tried between a half and `most`: entropy falls there, so bits do not grow with the density, and
        # whoever has that many bytes does better with wider values.
        low, high = 0.0, min(self.most, 0.5) if self.positions else self.most
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.bits(middle) <= bits else (low, middle)
        return low

    def first_guess(self, memory: Mapping[str, Tensor]) -> float:
        """The density before anything is encoded: a little too large, since nothing is set aside for the tensors."""
        return self.density(8 * self.budget / max(self.elements, 1) / _cost(memory))


@dataclass(frozen=True, eq=False, slots=True)
class BudgetFill(Generic[Made]):
    """What fills a budget: the entries at `density`, their payload's bytes, and what to remember for the next time."""

    entries: Mapping[str, Made]
    density: float
    size: int
    memory: Mapping[str, Tensor]


def fill_budget(
    room: Room,
    entries_at: Callable[[float], Mapping[str, Made]],
    size_of: Callable[[Mapping[str, Made]], int],
    memory: Mapping[str, Tensor],
) -> BudgetFill[Made]:
    """The largest of a few payloads that stays within the budget; that of density 0 where none does, whatever it takes.

    entries_at: density → entries; size_of: entries → bytes of their payload; memory: the participant's.
    """
    elements, tensors, cost = max(room.elements, 1), max(room.tensors, 1), _cost(memory)
    one = memory[LEAST].item() if LEAST in memory else size_of(entries_at(0.0)) / tensors
    least = round(one * tensors)
    best: tuple[Mapping[str, Made], float, int] | None = None
    for _ in range(_TRIES):
        density = room.density(8 * max(_AIM * room.budget - least, 0) / elements / cost)
        entries = entries_at(density)
        size = size_of(entries)
        if (best[2] if best else 0) < size <= room.budget:
            best = entries, density, size
        taken = best[2] if best else 0
        if taken > _USED * room.budget or (taken == size and density == room.most):
            break
        cost = max(8 * (size - least) / elements / max(room.bits(density), 1e-9), 0.1)
    if best is None:
        entries = entries_at(0.0)
        best = entries, 0.0, size_of(entries)
    return BudgetFill(*best, {COST: torch.tensor(cost), LEAST: torch.tensor(one)})


def _cost(memory: Mapping[str, Tensor]) -> float:
    return memory[COST].item() if COST in memory else 1.0


def value_bits(quantize: Quantize) -> float:
    """Bits of a value in the form in which values travel."""
    values = quantize(torch.ones(1), 0)
    return values.bits if isinstance(values, Quantized) else 8 * values.element_size()
