"""FLoRA-NA: the combination of factors whose product is nearest to the ideal (Nguyen et al., 2025, arXiv 2509.26399).

min over u, v ∈ R^K of ‖(Σ u_i B_i)(Σ v_j A_j) − Σ p_k B_k A_k‖_F, by alternating least squares. All of it rests on the
inner products ⟨B_i A_j, B_k A_l⟩ = Σ (B_iᵀ B_k) ∘ (A_j A_lᵀ), so nothing larger than K² r × r matrices is needed. The
factors of a client of lower rank go on with the server's components (`shared.whole`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from fedloom.lora.pair import PARTS, LoraPair, LoraState
from fedloom.methods.method import Aggregate, Context, Facts, Method, State, Update, both_factors
from fedloom.methods.shared.averaging import dense_entries, send_factors
from fedloom.methods.shared.whole import adopt_whole, read_whole_pairs, take_whole


def flora_na(*, sweeps: int = 20) -> Method:
    """sweeps: alternations between u and v, beginning with u = v = p (FedIT)."""
    return Method(
        name="flora-na",
        facts=Facts(
            paper="FLoRA-NA (arXiv 2509.26399)",
            unequal_ranks=True,
            stateless=True,
        ),
        compress=partial(send_factors, both_factors),
        aggregate=partial(nearest_factors, sweeps),
        receive=take_whole,
        replaces=PARTS,
        adopt=adopt_whole,
    )


def nearest_factors(sweeps: int, state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Σ u_k B_k and Σ v_k A_k of every module."""
    held = [(read_whole_pairs(update.entries, state.adapter), update.weight) for update in updates]
    shares = torch.tensor([weight for _, weight in held], dtype=torch.float64)
    pairs: dict[str, LoraPair] = {}
    for module in state.adapter:
        a = torch.stack([adapter[module].A for adapter, _ in held])
        b = torch.stack([adapter[module].B for adapter, _ in held])
        u, v = coefficients(a, b, shares, sweeps)
        pairs[module] = LoraPair(torch.einsum("k,krn->rn", v.float(), a), torch.einsum("k,kmr->mr", u.float(), b))
    return Aggregate(dense_entries(LoraState(pairs), context))


def coefficients(a: Tensor, b: Tensor, shares: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """u and v for A (K, r, n), B (K, m, r) and shares p (K,), float64. Never farther from the ideal than u = v = p."""
    a, b = a.double(), b.double()
    gram_a, gram_b = torch.einsum("jrn,lsn->jlrs", a, a), torch.einsum("imr,kms->ikrs", b, b)
    inner = torch.einsum("ikrs,jlrs->ijkl", gram_b, gram_a)  # ⟨B_i A_j, B_k A_l⟩
    ideal = torch.einsum("ijkk,k->ij", inner, shares)  # ⟨B_i A_j, ΔW*⟩
    u, v = shares.clone(), shares.clone()
    for _ in range(sweeps):
        u = _least_squares(torch.einsum("ijkl,j,l->ik", inner, v, v), ideal @ v, u)
        v = _least_squares(torch.einsum("ijkl,i,k->jl", inner, u, u), u @ ideal, v)
    return u, v


def _least_squares(gram: Tensor, target: Tensor, before: Tensor) -> Tensor:
    """The minimiser nearest to `before`; directions that the data do not determine are left as they are."""
    step: Tensor = torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ (target - gram @ before)
    return before + step
