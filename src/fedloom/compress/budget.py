"""From bytes to a density: how many elements of a change a payload has room for.

An estimate comes first. Each element costs the entropy of whether it is sent; an element that is sent costs its value's
bits as well. The density follows from the bytes. Encoding then shows the true size, which corrects the next guess.
A participant remembers two numbers from its last payload: how its true size compared with the entropy estimate, and
what a tensor costs when it sends a single element. Both only spare it trial encodings, and so does a sample of the
tensors where there are many elements: changes gather in fewer rows and columns from one round to the next.
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
"""Key in a participant's memory: size of its last payload over the entropy of its positions and values."""

LEAST = "least"
"""Key in a participant's memory: bytes of a tensor that sends a single element."""

SAMPLE = "sample"
"""Key in a participant's memory: COST of the last sample of tensors."""

SAMPLED = 2**22
"""Elements from which encoding a sample of the tensors costs less than the trial of all that it may spare."""

_DOUBT = 1.025  # a sample errs by one or two per cent, and too large a payload cannot be used
_TRIES = 5  # encodings at most: the estimate is near, and every try corrects it by a true size
_AIM = 0.99  # of the budget: aim a little low, since a payload above the budget cannot be used
_USED = 0.95  # of the budget: good enough; another encoding would cost more time than it wins bytes

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
        # Densities between a half and `most` are skipped. Entropy falls there, so bits need not grow with the density;
        # and with that many bytes wider values serve better. 40 halvings bring the density to a float's precision.
        low, high = 0.0, min(self.most, 0.5) if self.positions else self.most
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.bits(middle) <= bits else (low, middle)
        return low

    def aimed(self, least: float, cost: float) -> float:
        """The density that nearly fills the budget, `least` bytes set aside, where an entropy takes `cost` times it."""
        return self.density(8 * max(_AIM * self.budget - least, 0) / max(self.elements, 1) / cost)

    def as_before(self, memory: Mapping[str, Tensor]) -> float:
        """The density that would do if a payload cost what the last one did."""
        return self.aimed(memory[LEAST].item() * self.tensors, _cost(memory))

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
    """Try a few densities and return the largest payload within the budget.

    Where none is within it, the payload of density 0, whatever its size.

    entries_at: density → entries; size_of: entries → bytes of their payload; memory: the participant's.
    """
    elements, tensors, cost = max(room.elements, 1), max(room.tensors, 1), _cost(memory)
    one = memory[LEAST].item() if LEAST in memory else size_of(entries_at(0.0)) / tensors
    least = round(one * tensors)
    best: tuple[Mapping[str, Made], float, int] | None = None
    for _ in range(_TRIES):
        density = room.aimed(least, cost)
        entries = entries_at(density)
        size = size_of(entries)
        cost = _cost_of(size - least, elements, room.bits(density))
        if (best[2] if best else 0) < size <= room.budget:
            best = entries, density, size
        taken = best[2] if best else 0
        if taken > _USED * room.budget or (taken == size and density == room.most):
            break
    if best is None:
        entries = entries_at(0.0)
        best = entries, 0.0, size_of(entries)
    return BudgetFill(*best, {COST: torch.tensor(cost), LEAST: torch.tensor(one)})


def cost_of_sample(
    room: Room,
    elements: int,
    density: float,
    entries: Mapping[str, Made],
    size_of: Callable[[Mapping[str, Made]], int],
    memory: Mapping[str, Tensor],
) -> float:
    """COST of some tensors alone, of so many elements, at this density. room: of all tensors."""
    least = memory[LEAST].item() * len(entries)
    return _cost_of(size_of(entries) - least, elements, room.bits(density))


def expect_by_sample(memory: Mapping[str, Tensor], cost: float) -> Mapping[str, Tensor]:
    """The participant's memory where the sample costs this now.

    What all tensors cost is taken to have changed by the same factor since the last payload.
    """
    return {**memory, COST: memory[COST] * (_DOUBT * cost / memory[SAMPLE].item())}


def _cost_of(size: float, elements: int, bits: float) -> float:
    """So many bytes over the entropy of so many elements, each of so many bits."""
    # Floors: at density 0 there is nothing to divide by, and no coding takes a tenth of the entropy.
    return max(8 * size / elements / max(bits, 1e-9), 0.1)


def _cost(memory: Mapping[str, Tensor]) -> float:
    return memory[COST].item() if COST in memory else 1.0


def value_bits(quantize: Quantize) -> float:
    """Bits of a value in the form in which values travel."""
    values = quantize(torch.ones(1), 0)
    return values.bits if isinstance(values, Quantized) else 8 * values.element_size()
