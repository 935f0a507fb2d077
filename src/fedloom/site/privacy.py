"""Noise on what a site trains, and what it is worth: the Gaussian mechanism in every round.

A round releases Δ · min(1, C / ‖Δ‖) + N(0, (σ C)² I), Δ the change of all trained factors taken as one vector. The
noise is added before anything is selected, rounded or kept back for later, so whatever a method sends afterwards is
made from the noisy change and public states alone, and is covered.

Two data sets of the same site can move the clipped change by 2 C at most, and every round asks anew, so T rounds are
together one Gaussian mechanism with μ = 2 √T / σ (Dong, Roth & Su, "Gaussian differential privacy", cor. 3.3), whose
ε for a given δ is known exactly (cor. 2.13; Balle & Wang, arXiv 1805.06530, thm. 8). No accountant's bound is needed,
since no sampling of sites or examples is counted on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from fedloom.noise.stream import SecretStream
from fedloom.records.config import Section

if TYPE_CHECKING:
    from torch import Tensor


class Privacy(Section):
    """Noise that every update of the site carries. The guarantee is for the whole of the site's data."""

    clip_norm: float = Field(gt=0, description="C: largest norm of a round's change of all factors together.")
    noise_multiplier: float = Field(gt=0, description="σ: standard deviation of the noise as a multiple of clip_norm.")
    delta: float = Field(1e-6, gt=0, lt=1, description="δ at which ε is stated.")
    max_epsilon: float | None = Field(
        None, gt=0, description="Nothing leaves once all rounds together would pass this ε.", examples=[8.0]
    )

    @property
    def mu(self) -> float:
        """What one round costs: the most that two data sets can differ by, in standard deviations."""
        return 2.0 / self.noise_multiplier


def total_norm(change: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all tensors together."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in change.values()))


def release_change(change: Mapping[str, Tensor], privacy: Privacy) -> dict[str, Tensor]:
    """The change clipped to norm C, with fresh noise on every element. A change that is not finite counts as zero."""
    import torch  # here: the doctor reads a site's policy and record without it

    size = total_norm(change)
    finite = math.isfinite(size)
    factor = min(1.0, privacy.clip_norm / size) if finite and size else 1.0
    deviation = privacy.noise_multiplier * privacy.clip_norm
    noisy = {}
    for name, tensor in change.items():
        clipped = factor * tensor.double() if finite else torch.zeros_like(tensor, dtype=torch.float64)
        noisy[name] = (clipped + deviation * draw_normal(tensor.numel()).view(tensor.shape)).to(tensor.dtype)
    return noisy


def draw_normal(count: int) -> Tensor:
    """Independent N(0, 1) values, float64, from a key that the system draws and nobody keeps.

    See `noise.stream` for why no ordinary generator would do.
    """
    import torch

    return torch.from_numpy(SecretStream().normal(count))


def epsilon(mu: float, delta: float) -> float:
    """The least ε ≥ 0 for which a Gaussian mechanism of this μ is (ε, δ)-private; infinity where no float holds it."""
    if mu == 0 or _delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while _delta(high, mu) > delta:
        low, high = high, 2.0 * high
        if math.isinf(high):
            return math.inf
    # Bisection keeps δ(high) ≤ δ, so the result is never too small; nine digits are more than anybody states.
    while high - low > 1e-9 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _delta(middle, mu) > delta else (low, middle)
    return high


def _delta(eps: float, mu: float) -> float:
    """δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ); where the second term underflows it is left out, the safe side."""
    first = 0.5 * math.erfc((eps / mu - mu / 2) / math.sqrt(2))
    second = 0.5 * math.erfc((eps / mu + mu / 2) / math.sqrt(2))
    return first - (math.exp(eps + math.log(second)) if second > 0 else 0.0)
