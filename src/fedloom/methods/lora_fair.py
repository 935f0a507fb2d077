"""LoRA-FAIR: FedAvg with a corrected B (Bian et al., ICCV 2025, arXiv 2411.14961).

B̄ + ΔB with ΔB = argmin ‖(B̄ + ΔB) Ā − ΔW*‖² + λ ‖ΔB‖², so ΔB = (ΔW* − B̄ Ā) Āᵀ (Ā Āᵀ + λ I)⁻¹; λ → ∞ is FedIT.
The factors of a client of lower rank go on with the server's components (`shared.whole`), so that ΔW* is the mean of
the models.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from fedloom.errors import ConfigError
from fedloom.lora.pair import PARTS
from fedloom.methods.method import Aggregate, Context, Entries, Facts, Method, State, Update, both_factors
from fedloom.methods.shared.averaging import code_dense, send_factors, weighted_mean
from fedloom.methods.shared.components import read_pairs
from fedloom.methods.shared.whole import adopt_whole, average_whole, read_whole_pairs, take_whole


def lora_fair(*, ridge: float = 0.01) -> Method:
    """ridge: λ as a multiple of the largest eigenvalue of Ā Āᵀ, > 0."""
    if ridge <= 0:
        raise ConfigError(f"method.ridge is {ridge}: expected more than 0")
    return Method(
        name="lora-fair",
        facts=Facts(
            paper="LoRA-FAIR (arXiv 2411.14961)",
            unequal_ranks=True,
            stateless=True,
        ),
        updates="factors",
        compress=partial(send_factors, both_factors),
        aggregate=partial(correct_mean, ridge),
        receive=take_whole,
        replaces=PARTS,
        adopt=adopt_whole,
    )


def correct_mean(ridge: float, state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Ā and B̄ + ΔB, in float64 on r × r and m × r matrices only."""
    mean = dict(average_whole(state, updates, context).entries)
    means = read_pairs(mean)

    def projected(entries: Entries) -> dict[str, Tensor]:
        """B_k (A_k Āᵀ), m × r: the order of the products keeps m × n matrices away."""
        return {
            module: pair.B.double() @ (pair.A.double() @ means[module].A.double().T)
            for module, pair in read_whole_pairs(entries, state.adapter).items()
        }

    onto = weighted_mean(updates, read=projected)  # ΔW* Āᵀ
    for module, pair in means.items():
        a, b = pair.A.double(), pair.B.double()
        gram = a @ a.T
        strength = ridge * torch.linalg.matrix_norm(gram, 2)
        system = gram + strength * torch.eye(len(gram), dtype=torch.float64)
        change = torch.linalg.solve(system, (onto[module] - b @ gram).T).T
        mean[f"{module}/B"] = code_dense(f"{module}/B", (b + change).float(), context)
    return Aggregate(mean)
