"""Training that is made up: the changes of an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedloom.lora.curvature import scales_of
from fedloom.lora.directions import move_along_all
from fedloom.lora.pair import LoraPair, LoraState, subset
from fedloom.methods.forward import ForwardOnly
from fedloom.methods.method import Method, State
from fedloom.rounds.step import Train, Trained

Ranks = Mapping[str, int]


def train_part(train: Train, modules: Ranks) -> Train:
    """The step of a client that trains these modules only."""
    return lambda state, round, seed: train(replace(state, adapter=subset(state.adapter, modules)), round, seed)


def train_made_up(method: Method, *, fading: bool = False, steps: int = 10, run_seed: int = 0) -> Train:
    """A training step that changes what the method trains by heavy-tailed noise (kurtosis 8).

    fading: by normal noise instead, of which every further component of the pair has less, and A a tenth of what B has,
    as where B began at zero. steps, run_seed: of a round and of the run, for methods of forward passes alone.
    """
    if method.forward:
        return _train_along(method.forward, steps, run_seed)
    draw_a, draw_b = (_draw_small, _draw_columns) if fading else (draw_noise, draw_noise)

    def train(state: State, round: int, seed: int) -> Trained:
        generator = torch.Generator().manual_seed(seed)
        parts = method.parts(state, round)
        core = method.core(state)
        pairs = {}
        for module, pair in state.adapter.items():
            a, b = pair.A, pair.B
            if module in core:
                a = a + draw_a((pair.rank, core[module].rank), generator) @ core[module].A
            else:
                a = a + draw_a(tuple(a.shape), generator) if "A" in parts else a
                b = b + draw_b(tuple(b.shape), generator) if "B" in parts else b
            pairs[module] = LoraPair(a, b)
        return Trained(LoraState(pairs), num_examples=1, loss=0.0)

    return train


def _train_along(forward: ForwardOnly, steps: int, run_seed: int) -> Train:
    """Normal lengths along all directions that so many steps try."""

    def train(state: State, round: int, seed: int) -> Trained:
        moved = torch.zeros(forward.seeds)
        places = [number for step in range(steps) for number in forward.numbers(step, seed)]
        moved[places] = torch.randn(len(places), generator=torch.Generator().manual_seed(seed)).mul_(1e-3)
        lengths = {forward.seed(run_seed, round, place): float(moved[place]) for place in sorted(set(places))}
        return Trained(
            move_along_all(state.adapter, lengths, scales_of(state.curvature)), num_examples=1, loss=0.0, moved=moved
        )

    return train


def draw_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal values whose standard deviation is log-normal, about 1e-3."""
    scale = torch.randn(shape, generator=generator).mul_(0.5).exp_()
    return torch.randn(shape, generator=generator).mul_(scale).mul_(1e-3)


def draw_fading(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal values of standard deviation 1e-3 in the first row, and of 1e-3 / k in row k."""
    rows = torch.arange(1.0, shape[0] + 1.0)[:, None]
    return torch.randn(shape, generator=generator).div_(rows).mul_(1e-3)


def _draw_small(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return draw_fading(shape, generator).mul_(0.1)


def _draw_columns(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return draw_fading(shape[::-1], generator).T
