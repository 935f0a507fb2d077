"""How curved the loss is along each element of an adapter's factors, as far as past steps tell; alike on every machine.

HiSo (Li et al., ICLR 2026, arXiv 2506.02370) takes the running mean of a round's squared change for the Hessian's
diagonal. Here it is relative: its mean is 1, so that a learning rate means what it means without it, and so that it can
be had from the adapter alone. Nothing is added up in an order that a machine may choose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedloom.lora.pair import LoraPair, LoraState

_FLOOR = 1e-6  # of the mean: an element that has never moved is scaled a thousandfold at most
_GRID = 2.0**24  # squares are whole numbers of 1 / _GRID of the largest one while they are added up


def blend_curvature(curvature: LoraState, before: LoraState, after: LoraState, share: float) -> LoraState:
    """H ← (1 − share) H + share (Δ² / mean Δ² + ε) for the change Δ of a round; H is 1 where `curvature` is empty.

    The mean is over the whole adapter. A round in which nothing has changed leaves H as it is.
    """
    changes = {name: tensor - before.tensors()[name] for name, tensor in after.tensors().items()}
    largest = max((float(change.abs().max()) for change in changes.values() if change.numel()), default=0.0)
    if largest == 0.0:
        return curvature
    squares = {name: change.div_(largest).square_() for name, change in changes.items()}
    mean = sum(_sum_exactly(square) for square in squares.values()) / sum(map(Tensor.numel, squares.values()))

    def blend(name: str) -> Tensor:
        fresh = squares[name].mul_(1.0 / max(mean, 1.0 / _GRID)).add_(_FLOOR).mul_(share)
        module, _, part = name.rpartition("/")
        held = curvature[module].part(part) if curvature else torch.ones_like(fresh)
        return held.mul(1.0 - share).add_(fresh)

    return LoraState({module: LoraPair(blend(f"{module}/A"), blend(f"{module}/B")) for module in after})


def scales_of(curvature: LoraState) -> dict[str, Tensor]:
    """Tensor → 1 / √H, by which a direction is multiplied; empty where H is 1 everywhere."""
    return {name: held.sqrt().reciprocal_() for name, held in curvature.tensors().items()}


def _sum_exactly(squares: Tensor) -> float:
    """The sum of numbers from 0 to 1, in whole numbers, of which every order has the same one."""
    return int(squares.mul(_GRID).round_().to(torch.int64).sum()) / _GRID
