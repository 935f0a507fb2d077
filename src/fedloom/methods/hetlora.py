"""HetLoRA: zero-padded factors, weighted by the size of each client's change.

(Cho et al., EMNLP 2024, arXiv 2401.06432)

The paper's self-pruning, which lowers a client's rank for good, is left out: a client's rank is its own setting here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from fedloom.errors import ConfigError
from fedloom.lora.lowrank import frobenius_norm
from fedloom.lora.pair import PARTS, LoraState, module_of
from fedloom.methods.method import Aggregate, Context, Facts, Method, State, Update, both_factors
from fedloom.methods.shared.averaging import (
    code_dense,
    narrow_factors,
    replace_factors,
    send_factors,
    weighted_mean,
    zero_change,
)
from fedloom.methods.shared.components import read_pairs


def hetlora(*, tail_penalty: float = 0.0, tail_share: float = 0.25) -> Method:
    """tail_penalty: weight of ‖B_tail‖ ‖A_tail‖ in a client's loss, tail the last tail_share of its components."""
    if tail_penalty < 0 or not 0.0 < tail_share <= 1.0:
        raise ConfigError(f"method.tail_penalty {tail_penalty}, tail_share {tail_share}: expected ≥ 0 and in (0, 1]")
    return Method(
        name="hetlora",
        facts=Facts(
            paper="HetLoRA (arXiv 2401.06432)",
            unequal_ranks=True,
            own_part=True,
            sends="A and B of its own rank, dense",
            receives="the first rows and columns, dense",
            stateless=True,
        ),
        updates="factors",
        compress=partial(send_factors, both_factors),
        aggregate=weigh_by_norm,
        receive=replace_factors,
        replaces=PARTS,
        narrow=narrow_factors,
        penalty=partial(tail_size, tail_penalty, tail_share) if tail_penalty else None,
    )


def weigh_by_norm(state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Σ w_k of the zero-padded factors, w_k ∝ ‖B_k A_k‖_F module by module; p_k where every change is zero."""
    norms = {
        update.client: {module: frobenius_norm(pair) for module, pair in read_pairs(update.entries).items()}
        for update in updates
    }
    sums = {module: sum(sizes[module] for sizes in norms.values()) for module in state.adapter}

    def weight(update: Update, name: str) -> float:
        module = module_of(name)
        return norms[update.client][module] / sums[module] if sums[module] else update.weight

    means = weighted_mean(updates, start=zero_change(state.adapter), weight=weight)
    return Aggregate({name: code_dense(name, tensor, context) for name, tensor in means.items()})


def tail_size(weight: float, share: float, before: LoraState, now: LoraState) -> Tensor:
    """weight · Σ ‖B_tail‖_F ‖A_tail‖_F, which lets a client's last components die out if they are not needed."""
    sizes = []
    for pair in now.values():
        first = pair.rank - max(1, round(share * pair.rank))
        sizes.append(pair.B[:, first:].norm() * pair.A[first:].norm())
    return weight * torch.stack(sizes).sum()
