"""Server optimisers: the mean change of a round as a pseudo-gradient (Reddi et al., ICLR 2021, arXiv 2003.00295).

A wrapper over any method whose broadcast is a mean of factors or of their changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedloom.compress.entries import to_dense
from fedloom.errors import ConfigError
from fedloom.methods.method import Aggregate, Context, Method, State, Update
from fedloom.methods.shared.averaging import code_dense

Memory = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ServerOptimiser:
    """server_learning_rate η; server_momentum β (FedAvgM) or β1 (FedAdam); server_beta2 β2, server_tau τ (FedAdam)."""

    server_optimizer: Literal["fedavgm", "fedadam"]
    server_learning_rate: float = 1.0
    server_momentum: float = 0.9
    server_beta2: float = 0.99
    server_tau: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.server_learning_rate > 0 and 0 <= self.server_momentum < 1 and 0 <= self.server_beta2 < 1):
            raise ConfigError("method.server_learning_rate must be above 0, server_momentum and server_beta2 in [0, 1)")
        if self.server_tau <= 0:
            raise ConfigError(f"method.server_tau is {self.server_tau}: expected more than 0")

    def step(self, name: str, change: Tensor, memory: Memory) -> Tensor:
        """The step for one tensor; its moments in `memory` move on."""
        return _STEPS[self.server_optimizer](self, name, change, memory)


def _fedavgm(settings: ServerOptimiser, name: str, change: Tensor, memory: Memory) -> Tensor:
    """v ← β v + Δ, step η v (Hsu et al., arXiv 1909.06335)."""
    first = settings.server_momentum * memory.get(f"m/{name}", torch.zeros_like(change)) + change
    memory[f"m/{name}"] = first
    return settings.server_learning_rate * first


def _fedadam(settings: ServerOptimiser, name: str, change: Tensor, memory: Memory) -> Tensor:
    """m ← β1 m + (1 − β1) Δ, v ← β2 v + (1 − β2) Δ², step η m / (√v + τ)."""
    beta1, beta2 = settings.server_momentum, settings.server_beta2
    first = beta1 * memory.get(f"m/{name}", torch.zeros_like(change)) + (1 - beta1) * change
    second = beta2 * memory.get(f"v/{name}", torch.zeros_like(change)) + (1 - beta2) * change.square()
    memory[f"m/{name}"], memory[f"v/{name}"] = first, second
    return settings.server_learning_rate * first / (second.sqrt() + settings.server_tau)


_STEPS: Mapping[str, Callable[[ServerOptimiser, str, Tensor, Memory], Tensor]] = {
    "fedavgm": _fedavgm,
    "fedadam": _fedadam,
}


def broadcasts_mean(method: Method) -> bool:
    """Whether an optimiser can be put over what the method broadcasts."""
    return method.facts.broadcasts in ("factors", "change")


def optimise_mean(method: Method, optimiser: ServerOptimiser) -> Method:
    """The method with a server optimiser over its mean. Raises ConfigError for a method that broadcasts no mean."""
    if not broadcasts_mean(method):
        raise ConfigError(
            f"method {method.name!r} does not broadcast a mean, so method.server_optimizer cannot be used with it"
        )
    keeps = f"server: moments of {optimiser.server_optimizer}"
    return replace(
        method,
        facts=replace(method.facts, exact=False, stateless=False, keeps=keeps),
        aggregate=partial(_optimise, method, optimiser),
    )


def _optimise(
    method: Method, optimiser: ServerOptimiser, state: State, updates: Iterable[Update], context: Context
) -> Aggregate:
    plain = method.aggregate(state, updates, context)
    memory, now, entries = dict(state.memory), state.adapter.tensors(), {}
    for name, entry in plain.entries.items():
        start = now[name] if method.facts.broadcasts == "factors" else torch.zeros_like(now[name])
        entries[name] = code_dense(name, start + optimiser.step(name, to_dense(entry) - start, memory), context)
    return Aggregate(entries, memory, plain.stats)
