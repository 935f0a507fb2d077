"""What a malicious site sends in place of what it has trained: forged changes of the adapter.

    sign_flip   −s times its own change
    gaussian    noise, s times as large as its own change
    same_value  one value everywhere, s times as large as its own change
    lie         the honest mean less s standard deviations, element by element: within what honest sites differ by
                (A Little Is Enough; Baruch et al., NeurIPS 2019, arXiv 1902.06156)
    fall        −s times the honest mean (Fall of Empires; Xie et al., UAI 2019, arXiv 1903.03936)

A forger knows everything: what the honest sites of its round have trained. That is more than a real one would, so that a
defence which holds here holds there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.lora.pair import LoraState, from_tensors

Change = Mapping[str, Tensor]
"""module/part → after − before."""


@dataclass(frozen=True, eq=False, slots=True)
class Knowledge:
    """What a forger knows. own: its honest change; honest: those of the others that have its shapes.

    strength: s; generator: for noise.
    """

    own: Change
    honest: Sequence[Change]
    strength: float
    generator: torch.Generator

    @property
    def size(self) -> float:
        """√(mean square) of the own change over the factors that are trained."""
        moved = [tensor for tensor in self.own.values() if tensor.any()]
        count = sum(tensor.numel() for tensor in moved)
        return float(sum(tensor.double().square().sum() for tensor in moved) / max(count, 1)) ** 0.5

    def fill(self, make: Callable[[Tensor], Tensor]) -> Change:
        """make(tensor) for every factor that is trained, and zeros for the others."""
        return {
            name: make(tensor) if tensor.any() else torch.zeros_like(tensor) for name, tensor in self.own.items()
        }

    def stacked(self, name: str) -> Tensor:
        """The honest changes of one tensor, its own where it knows of no other."""
        return torch.stack([one[name] for one in self.honest] or [self.own[name]])


Forge = Callable[[Knowledge], Change]


def flip_sign(known: Knowledge) -> Change:
    """−s own."""
    return {name: -known.strength * tensor for name, tensor in known.own.items()}


def draw_noise(known: Knowledge) -> Change:
    """Normal noise as large as s times the own change."""
    scale = known.strength * known.size
    return known.fill(lambda tensor: scale * torch.randn(tensor.shape, generator=known.generator))


def send_one_value(known: Knowledge) -> Change:
    """One value, as large as s times the own change."""
    return known.fill(lambda tensor: torch.full_like(tensor, known.strength * known.size))


def lie_a_little(known: Knowledge) -> Change:
    """Mean − s σ of the honest changes."""
    return {
        name: known.stacked(name).mean(dim=0) - known.strength * known.stacked(name).std(dim=0, correction=0)
        for name in known.own
    }


def push_back(known: Knowledge) -> Change:
    """−s times the honest mean."""
    return {name: -known.strength * known.stacked(name).mean(dim=0) for name in known.own}


FORGERIES: Mapping[str, tuple[Forge, float]] = {
    "sign_flip": (flip_sign, 4.0),
    "gaussian": (draw_noise, 10.0),
    "same_value": (send_one_value, 10.0),
    "lie": (lie_a_little, 1.5),
    "fall": (push_back, 4.0),
}
"""Attack → (what is sent, its usual strength s)."""


def change_of(before: LoraState, after: LoraState) -> Change:
    """after − before, of the modules that are trained; `before` is cut to their ranks."""
    held = before.tensors()
    return {
        name: tensor - held[name][: tensor.shape[0], : tensor.shape[1]] for name, tensor in after.tensors().items()
    }


def add_change(before: LoraState, change: Change) -> LoraState:
    """before + change."""
    held = before.tensors()
    return from_tensors(
        {name: held[name][: one.shape[0], : one.shape[1]] + one for name, one in change.items()}
    )
