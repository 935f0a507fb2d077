"""Local training by forward passes alone: which directions a client tries, and how they are named by both sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError

MOST_SEEDS = 65536
"""Directions that a round may choose from."""


@dataclass(frozen=True, slots=True)
class ForwardOnly:
    """Steps along directions z_j that everybody draws from seeds, j from 0 to `seeds` − 1.

    A step tries `perturbations` of them: g_j = (L(θ + ε z_j) − L(θ − ε z_j)) / 2ε is a loss's slope along z_j, by two
    forward passes (Spall, 1992), and the step is −η g_j z_j, the mean over j. Over all z its mean is −η times the
    gradient.

    shared: all clients try the same directions in the same order, and other ones in every round (DeComFL). Otherwise
    the directions are the same in all rounds, and each client draws its own from them (FedKSeed).

    curvature: above 0, every element of a direction is divided by the square root of its curvature, in which a round's
    squared change has this share (HiSo; see `lora.curvature`).
    """

    seeds: int
    perturbations: int
    epsilon: float
    shared: bool
    curvature: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise ConfigError(f"method.seeds is {self.seeds}: expected 1 to {MOST_SEEDS}")
        if not 1 <= self.perturbations <= self.seeds:
            raise ConfigError(
                f"method.perturbations is {self.perturbations}: expected 1 to {self.seeds}, as many as there are seeds"
            )
        if not 0.0 < self.epsilon < 1.0:
            raise ConfigError(f"method.epsilon is {self.epsilon}: expected more than 0 and less than 1")
        if not 0.0 <= self.curvature < 1.0:
            raise ConfigError(f"method.smoothing is {self.curvature}: expected 0 or more, and less than 1")

    def seed(self, run: int, round: int, number: int) -> int:
        """The seed of direction `number` in a round of the run of this seed."""
        return derived_seed(run, "forward", round if self.shared else 0, number)

    def numbers(self, step: int, seed: int) -> list[int]:
        """The directions that a client tries in a step (from 0). seed: of its training in this round."""
        if self.shared:
            return [(step * self.perturbations + place) % self.seeds for place in range(self.perturbations)]
        generator = torch.Generator().manual_seed(derived_seed(seed, "step", step))
        drawn: list[int] = torch.randperm(self.seeds, generator=generator)[: self.perturbations].tolist()
        return drawn
