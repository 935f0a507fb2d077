"""The training step: what a round asks of it, what it gives, and a step that has to know its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedloom.lora.pair import LoraState
from fedloom.methods.method import Method, State


@dataclass(frozen=True, eq=False, slots=True)
class Trained:
    """What a training step returns: the adapter after it (only the modules that the client trains), and numbers.

    stages: seconds of the rest of the client's turn, which `client_turn` adds. moved: of a training by forward passes
    alone, how far it went along each direction (`Method.forward`); empty for any other.
    """

    adapter: LoraState
    num_examples: int
    loss: float
    steps: int = 0
    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)
    moved: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)


class Train(Protocol):
    """(state, round, seed) → the adapter trained from state.adapter on top of state.fixed."""

    def __call__(self, state: State, round: int, seed: int) -> Trained: ...


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """What a run asks of a client's training, beside state, round and seed. What is not known is left out.

    ranks and alphas: of the modules that the client trains. steps: of the optimiser, in a round; epochs: passes over
    the client's examples, in place of steps. num_rounds: 0 where that is not known. `interrupt` is to be called before
    every forward pass, and may end the training by raising.
    """

    method: Method | None = None
    num_rounds: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    steps: int = 0
    epochs: float = 0.0
    interrupt: Callable[[], None] | None = None


@runtime_checkable
class TrainForTask(Train, Protocol):
    """A training step that has to know the run that it is used in."""

    def for_task(self, task: Task) -> Train:
        """The step for this run. Raises ConfigError or ModelError where the two do not go together."""


def fit_to_task(train: Train, task: Task) -> Train:
    """The training step for a run, where it asks for one; else as it is."""
    return train.for_task(task) if isinstance(train, TrainForTask) else train
