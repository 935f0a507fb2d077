"""Directions in the space of an adapter's factors that everybody draws alike from a seed, so that they never travel.

A direction has a sign for every element of A and B. Signs are bits of an integer generator, so that they are the same
on every machine, which normal numbers, made by logarithms and cosines, need not be.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedloom.compress.masks import seeded_signs
from fedloom.lora.pair import PARTS, LoraPair, LoraState

Direction = Mapping[str, Tensor]
"""Name of a factor ("module/A") → its signs, −1 and 1, or these times a scale of their own."""
_AS_THEY_ARE: Mapping[str, Tensor] = {}


def draw_direction(adapter: LoraState, seed: int, scales: Mapping[str, Tensor] = _AS_THEY_ARE) -> Direction:
    """The direction of a seed: signs for the adapter's factors, drawn one factor after the other in order of name.

    scales: name of a factor → what its signs are multiplied with; nothing where they are left as they are.
    """
    found: dict[str, Tensor] = {}
    signs, end = seeded_signs(adapter.numel(), seed), 0
    for name, tensor in adapter.tensors().items():
        begin, end = end, end + tensor.numel()
        found[name] = signs[begin:end].view(tensor.shape)
        if scales:
            found[name] *= scales[name]
    return found


def move_along(adapter: LoraState, direction: Direction, step: float) -> LoraState:
    """The adapter after a step of this length along a direction."""
    moved = {
        module: LoraPair(*(_moved(pair.part(part), direction[f"{module}/{part}"], step) for part in PARTS))
        for module, pair in adapter.items()
    }
    return LoraState(moved)


def _moved(tensor: Tensor, along: Tensor, step: float) -> Tensor:
    # Multiplied and then added: some processors would round the two together once, and others twice.
    return along.mul(step).add_(tensor)


def move_along_all(
    adapter: LoraState, steps: Mapping[int, float], scales: Mapping[str, Tensor] = _AS_THEY_ARE
) -> LoraState:
    """θ + Σ s_j z_j for steps s_j along the directions of these seeds, in the order that they are given in."""
    moved = LoraState({module: LoraPair(pair.A.clone(), pair.B.clone()) for module, pair in adapter.items()})
    tensors = moved.tensors()
    for seed, step in steps.items():
        for name, along in draw_direction(moved, seed, scales).items():
            tensors[name].add_(along.mul_(step))
    return moved
