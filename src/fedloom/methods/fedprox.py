"""FedProx: FedIT whose clients are held near the global adapter (Li et al., MLSys 2020, arXiv 1812.06127)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState
from fedloom.methods.fedit import fedit
from fedloom.methods.method import Method


def fedprox(*, mu: float = 0.01) -> Method:
    """mu: weight of the penalty mu/2 · Σ ‖θ − θ_global‖² on the factors, ≥ 0; 0 is FedIT."""
    if mu < 0:
        raise ConfigError(f"method.mu is {mu}: expected at least 0")
    plain = fedit()
    return replace(
        plain,
        name="fedprox",
        # Offline there is nobody to hold near: that is FedIT.
        facts=replace(plain.facts, paper="FedProx (arXiv 1812.06127)", stateless=False),
        penalty=partial(proximal_penalty, mu),
    )


def proximal_penalty(mu: float, before: LoraState, now: LoraState) -> Tensor:
    """mu/2 times the squared distance of the live factors from the ones training began with."""
    old = before.tensors()
    squares = [(tensor - old[name].to(tensor.device)).square().sum() for name, tensor in now.tensors().items()]
    return mu / 2 * torch.stack(squares).sum()
