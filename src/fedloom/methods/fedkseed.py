"""FedKSeed: forward passes alone, K seeds for the whole run, scalars on the wire (Qin et al., ICML 2024,
arXiv 2312.06353).

In a step a client draws one of K directions z_j, measures the slope g of its loss along it by two forward passes, and
goes −η g z_j. It sends how far it went along each direction that it drew. The model is always the first one and K sums,
θ = θ_0 + Σ_j s_j z_j. Here θ are the factors A and B; the paper moves all weights.
"""

from __future__ import annotations

from fedloom.methods.forward import ForwardOnly
from fedloom.methods.method import Method
from fedloom.methods.shared.scalars import method_of_scalars


def fedkseed(*, seeds: int = 4096, perturbations: int = 1, epsilon: float = 1e-3) -> Method:
    """training.learning_rate is η and training.max_steps the number of steps; no optimiser is used.

    seeds: K, directions of the whole run, each client's steps along some of its own choice. perturbations: directions
    that a step tries, of which it takes the mean. epsilon: ε, how far to both sides an element is moved to try.
    """
    return method_of_scalars(
        "fedkseed", "FedKSeed (arXiv 2312.06353)", ForwardOnly(seeds, perturbations, epsilon, False)
    )
