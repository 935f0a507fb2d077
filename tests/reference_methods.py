"""Slow dense float64 twins of whole rounds, written from the papers' formulas and sharing no code with the package.

Every function takes numpy arrays per module: (A, B) before, a list of (A_k, B_k) after training, and shares p_k.
"""

from __future__ import annotations

import math

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]


def fedit(after: list[Pair], shares: list[float]) -> Pair:
    return (
        sum(p * a for p, (a, _) in zip(shares, after, strict=True)),
        sum(p * b for p, (_, b) in zip(shares, after, strict=True)),
    )


def product(after: list[Pair], shares: list[float]) -> np.ndarray:
    return sum(p * b @ a for p, (a, b) in zip(shares, after, strict=True))


def florist(after: list[Pair], shares: list[float], tau: float) -> np.ndarray:
    """The leading part of Σ p_k B_k A_k that holds the share tau of the squared singular values."""
    u, s, vt = np.linalg.svd(product(after, shares), full_matrices=False)
    energy = np.cumsum(s**2) / np.sum(s**2)
    rank = next(i + 1 for i in range(len(s)) if energy[i] >= tau or i == len(s) - 1)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def sparsified(before: Pair, after: Pair, base: float = 0.85, slope: float = 0.1, upper: float = 0.11) -> Pair:
    """What one FedSRD client sends, dense: its change with the unimportant elements set to zero, L1-rescaled."""
    (a, b), (a_new, b_new) = before, after
    delta_a, delta_b = a_new - a, b_new - b
    score_a, score_b = np.zeros_like(delta_a), np.zeros_like(delta_b)
    for u in range(delta_a.shape[0]):
        for v in range(delta_a.shape[1]):
            score_a[u, v] = abs(delta_a[u, v]) * math.sqrt(sum(x * x for x in b_new[:, u]))
    for u in range(delta_b.shape[0]):
        for v in range(delta_b.shape[1]):
            score_b[u, v] = abs(delta_b[u, v]) * math.sqrt(sum(x * x for x in a[v, :]))
    return _kept(delta_a, score_a, base, slope, upper), _kept(delta_b, score_b, base, slope, upper)


def _kept(delta: np.ndarray, score: np.ndarray, base: float, slope: float, upper: float) -> np.ndarray:
    x = score.ravel()
    variance = np.mean((x - x.mean()) ** 2)
    kurt = np.mean((x - x.mean()) ** 4) / variance**2 if variance else 1.0
    rho = base + min(upper, slope * math.log(max(kurt, 1.0)))
    keep = max(1, round((1 - rho) * x.size))
    order = sorted(range(x.size), key=lambda i: -x[i])[:keep]
    out = np.zeros(x.size)
    for i in order:
        out[i] = delta.ravel()[i] if x[i] > 0 else 0.0
    norm = np.abs(out).sum()
    return (out * (np.abs(delta).sum() / norm if norm else 1.0)).reshape(delta.shape)


def fedsrd_change(before: Pair, sent: list[Pair], shares: list[float], part: str, rank: int | None) -> np.ndarray:
    """The server's change of one factor, before it is thinned out: δ A⁺ or B⁺ δ, δ = (rank-r part of) W − B A."""
    a, b = before
    total = sum(p * (b + db) @ (a + da) for p, (da, db) in zip(shares, sent, strict=True))
    if rank is not None:
        u, s, vt = np.linalg.svd(total, full_matrices=False)
        total = (u[:, :rank] * s[:rank]) @ vt[:rank]
    delta = total - b @ a
    return delta @ np.linalg.pinv(a, rcond=1e-6) if part == "B" else np.linalg.pinv(b, rcond=1e-6) @ delta


# --- clients of lower rank than the server ------------------------------------------------------------------------


def held(server: Pair, sent: Pair) -> Pair:
    """The factors that a client's model has, component by component: its own as far as they go, then the server's."""
    a, b = np.array(server[0]), np.array(server[1])
    for component in range(len(sent[0])):
        a[component, :], b[:, component] = sent[0][component], sent[1][:, component]
    return a, b


def widened(server: Pair, change: Pair) -> Pair:
    """A client's change as one of the server's factors: nothing beyond its own components."""
    a, b = np.zeros_like(server[0]), np.zeros_like(server[1])
    for component in range(len(change[0])):
        a[component, :], b[:, component] = change[0][component], change[1][:, component]
    return a, b


def lora_fair(after: list[Pair], shares: list[float], ridge: float) -> Pair:
    """Ā and the B that minimises ‖B Ā − ΔW*‖² + λ ‖B − B̄‖², by the normal equations of the stacked problem."""
    a, b = fedit(after, shares)
    strength = ridge * np.linalg.norm(a @ a.T, 2)
    left = np.concatenate([a.T, math.sqrt(strength) * np.eye(len(a))])
    right = np.concatenate([(product(after, shares) - b @ a).T, np.zeros((len(a), len(b)))])
    return a, b + np.linalg.lstsq(left, right, rcond=None)[0].T


def flora_na(after: list[Pair], shares: list[float], sweeps: int) -> np.ndarray:
    """(Σ u_k B_k)(Σ v_k A_k) nearest to ΔW*, by alternating least squares on m × n matrices."""
    target, u, v = product(after, shares).ravel(), np.array(shares), np.array(shares)
    for _ in range(sweeps):
        a = sum(x * pair[0] for x, pair in zip(v, after, strict=True))
        u = np.linalg.lstsq(np.stack([(pair[1] @ a).ravel() for pair in after], axis=1), target, rcond=None)[0]
        b = sum(x * pair[1] for x, pair in zip(u, after, strict=True))
        v = np.linalg.lstsq(np.stack([(b @ pair[0]).ravel() for pair in after], axis=1), target, rcond=None)[0]
    a = sum(x * pair[0] for x, pair in zip(v, after, strict=True))
    return b @ a
