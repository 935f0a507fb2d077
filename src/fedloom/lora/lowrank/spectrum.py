"""What is asked of a kernel, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom.lora.pair import LoraPair


class Wanted(NamedTuple):
    """The leading `rank` components, or as many as hold the share `energy` of Σσ², or all where both are None.

    expected: the rank that an energy cut is likely to keep.
    """

    rank: int | None = None
    energy: float | None = None
    expected: int | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Spectrum:
    """energies: σ², descending, float64. beyond: Σσ² of what was not computed. floor: energies up to it are zero.

    expand(p): the leading p components as B = U diag(σ), A = Vᵀ, signs not yet fixed.
    """

    energies: Tensor
    beyond: float
    floor: float
    expand: Callable[[int], LoraPair]


def noise_floor(top: float, noise: float, dtype: torch.dtype) -> float:
    """The energy up to which a component may be rounding alone: an error of four units in the last place, squared."""
    return max(noise, top * (4 * torch.finfo(dtype).eps) ** 2)
