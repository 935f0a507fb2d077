"""Frobenius norms, inner products and errors of products B A, in float64, without forming them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedloom.lora.pair import LoraPair, stack_pairs


def inner_product(first: LoraPair, second: LoraPair) -> float:
    """⟨B1 A1, B2 A2⟩ = Σ (B1ᵀ B2) ∘ (A1 A2ᵀ)."""
    left = first.B.double().T @ second.B.double()
    right = first.A.double() @ second.A.double().T
    return float((left * right).sum())


def frobenius_norm(pair: LoraPair) -> float:
    """‖B A‖_F, accurate to rounding even where the factors nearly cancel."""
    rb = torch.linalg.qr(pair.B.double(), mode="r").R
    ra = torch.linalg.qr(pair.A.double().T, mode="r").R
    return float(torch.linalg.matrix_norm(rb @ ra.T))


def relative_error(approx: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float]) -> float:
    """‖approx − Σ w_k B_k A_k‖_F / ‖Σ w_k B_k A_k‖_F; 0 where both are zero, infinite where only the sum is."""
    terms = [LoraPair(p.A.double(), p.B.double() * w) for p, w in zip(pairs, weights, strict=True)]
    size = frobenius_norm(stack_pairs(terms))
    error = frobenius_norm(stack_pairs([*terms, LoraPair(approx.A.double(), -approx.B.double())]))
    return error / size if size else (0.0 if error == 0.0 else float("inf"))
