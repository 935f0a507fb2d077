"""HiSo: forward passes along shared directions that are scaled by how curved the loss is (Li et al., ICLR 2026,
arXiv 2506.02370).

DeComFL whose directions are divided by the root of an estimate of the Hessian's diagonal. Everybody makes the estimate
from the steps that all have taken, so that nothing of it travels but to a newcomer, in the full state.
"""

from __future__ import annotations

from fedloom.methods.forward import ForwardOnly
from fedloom.methods.method import Method
from fedloom.methods.shared.scalars import method_of_scalars


def hiso(*, perturbations: int = 10, epsilon: float = 1e-3, seeds: int = 4096, smoothing: float = 0.05) -> Method:
    """training.learning_rate is η and training.max_steps the number of steps; no optimiser is used.

    perturbations: P, directions that a step tries, of which it takes the mean. epsilon: ε, how far to both sides an
    element is moved to try, before it is scaled. seeds: directions of a round; where its steps try more, they begin
    anew. smoothing: the share of a round's squared change in the estimate; 0 is DeComFL.
    """
    forward = ForwardOnly(seeds, perturbations, epsilon, shared=True, curvature=smoothing)
    return method_of_scalars("hiso", "HiSo (arXiv 2506.02370)", forward)
