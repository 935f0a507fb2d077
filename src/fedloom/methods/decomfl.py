"""DeComFL: forward passes alone along directions that all clients share in a round (Li et al., ICLR 2025,
arXiv 2405.15861).

All clients try the same directions in the same order, other ones in every round, each on its own examples. The server
averages their scalars direction by direction, so that neither indices nor more scalars than one client's travel.
"""

from __future__ import annotations

from fedloom.methods.forward import ForwardOnly
from fedloom.methods.method import Method
from fedloom.methods.shared.scalars import method_of_scalars


def decomfl(*, perturbations: int = 10, epsilon: float = 1e-3, seeds: int = 4096) -> Method:
    """training.learning_rate is η and training.max_steps the number of steps; no optimiser is used.

    perturbations: P, directions that a step tries, of which it takes the mean. epsilon: ε, how far to both sides an
    element is moved to try. seeds: directions of a round; where its steps try more, they begin anew.
    """
    return method_of_scalars("decomfl", "DeComFL (arXiv 2405.15861)", ForwardOnly(seeds, perturbations, epsilon, True))
