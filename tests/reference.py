"""Slow twins of the server kernels: dense, float64, one formula a line. What is fast is held to these."""

import torch


def product_sum(pairs, weights):
    """Σ w_k B_k A_k, m × n."""
    return sum(w * (p.B.double() @ p.A.double()) for p, w in zip(pairs, weights, strict=True))


def dense(pair):
    return pair.B.double() @ pair.A.double()


def singular_values(matrix):
    return torch.linalg.svdvals(matrix)


def best_rank(matrix, rank):
    """The best approximation of at most `rank` (Eckart-Young)."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def energy_rank(matrix, tau):
    """The least p with Σ_{i ≤ p} σ_i² ≥ tau Σ σ_i²."""
    energies = singular_values(matrix).square().tolist()
    total, held = sum(energies), 0.0
    for p, value in enumerate(energies):
        if held >= tau * total:
            return p
        held += value
    return len(energies)


def pseudo_inverse(matrix, ridge=0.0, rcond=1e-6):
    """σ → σ / (σ² + ridge σ_max²), or 0 where σ ≤ rcond σ_max."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    top = s.max() if s.numel() else 0.0
    inverted = torch.where(s > rcond * top, s / (s * s + ridge * top * top), 0.0)
    return (vt.T * inverted) @ u.T


def fedsrd(pair, changes, weights, side, rank=None, ridge=0.0, rcond=1e-6):
    """FedSRD (rank) or FedSRD-e (None), METHODS §1: W = Σ w_k (B + ΔB_k)(A + ΔA_k), δ = W_r − B A, in one factor."""
    a, b = pair.A.double(), pair.B.double()
    total = sum(w * ((b + db.double()) @ (a + da.double())) for (db, da), w in zip(changes, weights, strict=True))
    delta = (total if rank is None else best_rank(total, rank)) - b @ a
    return pseudo_inverse(b, ridge, rcond) @ delta if side == "A" else delta @ pseudo_inverse(a, ridge, rcond)


def florist(pairs, weights, tau):
    """FLoRIST as published, METHODS §2: SVD of both stacks, SVD of the core, the least rank with the share tau."""
    stacked_b = torch.cat([p.B.double() for p in pairs], dim=1)
    stacked_a = torch.cat([w * p.A.double() for p, w in zip(pairs, weights, strict=True)])
    ub, sb, vbt = torch.linalg.svd(stacked_b, full_matrices=False)
    ua, sa, vat = torch.linalg.svd(stacked_a, full_matrices=False)
    up, sp, vpt = torch.linalg.svd((sb[:, None] * vbt) @ (ua * sa))
    p = energy_rank(torch.diag(sp), tau)
    return ub @ up[:, :p] * sp[:p], vpt[:p] @ vat
