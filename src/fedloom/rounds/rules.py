"""Robust rules as shares: what each client of a round counts for, from the Gram matrix of their changes alone.

A rule that ends in shares p_k goes with every method, since every method combines Σ p_k of something. So these rules
find no new vector; they say who counts for how much of it.

    clip              p_k falls by c², c = ratio · median / ‖Δ_k‖ where that is below 1. The first c bounds p_k ‖Δ_k‖;
                      with the second one it falls as ‖Δ_k‖ grows, as in Hampel's redescending estimators (JASA 1974).
                      By the bound alone, who sends ten times as much would have more say than anybody honest
    geometric median  Weiszfeld's weights, 1 over the distance from the median (Pillutla et al., IEEE TSP 2022,
                      arXiv 1912.13445), of updates that were first mixed with their nearest neighbours (Allouah et al.,
                      AISTATS 2023, arXiv 2302.01772): what is left when liars are far is the mean of all others
    trimmed           without the f that lie farthest from the geometric median
    multi-Krum        without the f whose nearest neighbours are farthest (Blanchard et al., NeurIPS 2017)

Everything is float64 on matrices of K × K, in the order of the clients' names, so that the same updates give the same
bits in every engine.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedloom.rounds.caps import FEWEST, positive_median

_STEPS = 200
"""Weiszfeld's steps: it converges linearly, and these take a millisecond."""
_NEAR = 1e-9
"""Share of the mean distance below which a distance counts as this: an update may lie on the median itself."""


def clip_factors(norms: Sequence[float], ratio: float) -> list[float]:
    """What clipping leaves of each update: 1 up to `ratio` times the upper median of the norms, then inversely less.

    Of two, nobody can say which is too large.
    """
    if len(norms) < FEWEST:
        return [1.0] * len(norms)
    middle = statistics.median_high(norms) or positive_median({str(place): norm for place, norm in enumerate(norms)})
    most = ratio * middle
    return [1.0 if norm <= most else most / norm for norm in norms]


def squared_distances(gram: Tensor) -> Tensor:
    """‖x_i − x_j‖² of all pairs."""
    sizes = gram.diagonal()
    return (sizes[:, None] + sizes[None, :] - 2.0 * gram).clamp_min(0.0)


def mix_nearest(gram: Tensor, masses: Tensor, faults: int) -> Tensor:
    """The matrix M (K × K) of which row i is the mean of the K − f updates that lie nearest to x_i, itself included."""
    clients = len(gram)
    order = squared_distances(gram).sort(dim=1, stable=True).indices[:, : max(clients - faults, 1)]
    chosen = torch.zeros_like(gram).scatter_(1, order, 1.0) * masses
    return chosen / chosen.sum(dim=1, keepdim=True)


def median_weights(gram: Tensor, masses: Tensor) -> Tensor:
    """w with Σ w_k x_k the geometric median, which has the least Σ m_k ‖x_k − z‖."""
    weights = masses / masses.sum()
    for _ in range(_STEPS):
        distances = _distances_from(gram, weights)
        least = _NEAR * float(distances.mean()) or 1.0
        found = masses / distances.clamp_min(least)
        found = found / found.sum()
        if torch.allclose(found, weights, rtol=0.0, atol=1e-12):
            return found
        weights = found
    return weights


def _distances_from(gram: Tensor, weights: Tensor) -> Tensor:
    """‖x_k − Σ w_j x_j‖ of every k."""
    toward = gram @ weights
    return (gram.diagonal() - 2.0 * toward + weights @ toward).clamp_min(0.0).sqrt()


def geometric_median(gram: Tensor, masses: Tensor, faults: int) -> Tensor:
    """Shares of the geometric median of the mixed updates. Raises nothing; K > 2 f is the caller's to see to."""
    mixing = mix_nearest(gram, masses, faults)
    shares = mixing.T @ median_weights(mixing @ gram @ mixing.T, masses)
    return shares / shares.sum()


def trimmed(gram: Tensor, masses: Tensor, faults: int) -> Tensor:
    """Shares as they were of the K − f nearest to the geometric median, and 0 of the others."""
    return _keep(_distances_from(gram, median_weights(gram, masses)), masses, faults)


def multi_krum(gram: Tensor, masses: Tensor, faults: int) -> Tensor:
    """Shares as they were of the K − f whose K − f − 2 nearest neighbours are nearest, and 0 of the others."""
    near = squared_distances(gram).sort(dim=1).values[:, 1 : max(len(gram) - faults - 1, 2)]
    return _keep(near.sum(dim=1), masses, faults)


def _keep(scores: Tensor, masses: Tensor, faults: int) -> Tensor:
    """The masses of all but the f highest scores; of equal ones the first stays."""
    kept = scores.sort(stable=True).indices[: len(scores) - faults]
    shares = torch.zeros_like(masses)
    shares[kept] = masses[kept]
    return shares / shares.sum()


Rule = Callable[[Tensor, Tensor, int], Tensor]
"""(Gram matrix, masses, f) → shares, which sum to 1."""
RULES: Mapping[str, Rule] = {"geometric_median": geometric_median, "trimmed": trimmed, "multi_krum": multi_krum}
LEAST: Mapping[str, tuple[int, int]] = {"geometric_median": (2, 1), "trimmed": (2, 1), "multi_krum": (2, 3)}
"""Rule → (a, b): it takes K ≥ a f + b updates to withstand f liars."""


def most_faults(rule: str, clients: int) -> int:
    """How many liars among so many clients the rule withstands; 0 where it withstands none."""
    a, b = LEAST[rule]
    return max((clients - b) // a, 0)


def change_norms(gram: Tensor) -> list[float]:
    """‖ΔW_k − ΔW‖ of every client."""
    return [math.sqrt(size) for size in gram.diagonal().clamp_min(0.0).tolist()]
