"""How far the kernels are from float64, and from the best that their rank allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.workload import Module, module
from fedloom.compress.entries import to_dense
from fedloom.lora.lowrank import FactorChange, ProductChange, Truncation, frobenius_norm, truncate
from fedloom.lora.pair import LoraPair, stack_pairs

CONDITIONS = (1.0, 1e2, 1e4, 1e6)


@dataclass(frozen=True, slots=True)
class Deviation:
    """error: relative, against float64: of ΔA in Frobenius norm, or of the singular values by the largest of them.

    excess: by what share the error of the approximation exceeds that of the best one of its rank; None for a change.
    """

    error: float
    excess: float | None = None


def changed(case: Module, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(B + ΔB_k, A + ΔA_k, w_k) of every client."""
    a, b = case.pair.A.to(dtype), case.pair.B.to(dtype)
    for client in case.clients:
        yield b + to_dense(client.delta_b), a + to_dense(client.delta_a), client.weight


def change(case: Module, rank: int | None) -> FactorChange:
    """What the clients' sparse changes amount to as a change of A."""
    total = ProductChange(case.pair, "A", rank=rank)
    for client in case.clients:
        total.add(client.delta_b, client.delta_a, client.weight)
    return total.solve()


def of_fedsrd(case: Module) -> Deviation:
    """Of FedSRD's ΔA."""
    return _of_change(case, case.pair.rank)


def of_fedsrd_e(case: Module) -> Deviation:
    """Of FedSRD-e's ΔA."""
    return _of_change(case, None)


def _of_change(case: Module, rank: int | None) -> Deviation:
    total = stack_pairs([LoraPair(a, b * weight) for b, a, weight in changed(case, torch.float64)])
    if rank is not None:
        total = truncate(total, rank=rank).pair
    b = case.pair.B.double()
    inverse = torch.linalg.pinv(b, rtol=1e-6)
    exact = (inverse @ total.B) @ total.A - (inverse @ b) @ case.pair.A.double()
    found = change(case, rank).delta.double()
    return Deviation(float((found - exact).norm() / exact.norm()))


def of_cut(case: Module, cut: Truncation) -> Deviation:
    """Of a truncated sum of products."""
    terms = [LoraPair(p.A.double(), p.B.double() * w) for p, w in zip(case.pairs(), case.weights(), strict=True)]
    exact = truncate(stack_pairs(terms)).singular_values
    common = min(exact.numel(), cut.singular_values.numel())
    error = float((cut.singular_values[:common] - exact[:common]).abs().max() / exact[0])
    best = float(exact[cut.pair.rank :].square().sum().sqrt())
    rest = frobenius_norm(stack_pairs([*terms, LoraPair(cut.pair.A.double(), -cut.pair.B.double())]))
    return Deviation(error, rest / best - 1.0 if best > 1e-6 * float(exact[0]) else None)


def flat(shape: tuple[int, int], rank: int, clients: int) -> Module:
    """Clients with equal singular values in directions of their own: there is no leading subspace to find."""
    case = module("flat", shape, [rank] * clients, seed=0)
    m, n = shape
    stacked = rank * clients
    left, right = (torch.linalg.qr(torch.randn(size, stacked, dtype=torch.float64)).Q.float() for size in (m, n))
    pairs = zip(left.chunk(clients, 1), right.T.chunk(clients, 0), strict=True)
    flats = [replace(c, pair=LoraPair(a, b), weight=1.0) for c, (b, a) in zip(case.clients, pairs, strict=True)]
    return replace(case, clients=tuple(flats))


def conditioned(case: Module, condition: float) -> Module:
    """The module with the singular values of B spread geometrically from 1 to 1 / condition."""
    u, s, vt = torch.linalg.svd(case.pair.B.double(), full_matrices=False)
    spread = s[0] * condition ** -torch.linspace(0, 1, s.numel(), dtype=torch.float64)
    return replace(case, pair=LoraPair(case.pair.A, ((u * spread) @ vt).float()))


def hard_cases(rank: int, clients: int) -> list[dict[str, object]]:
    """Rows of the accuracy table: B ever nearer to singular, and a flat spectrum. On a module of 1024 × 3072."""
    shape = (1024, 3072)
    base = module("conditioned", shape, [rank] * clients, seed=0)
    rows: list[dict[str, object]] = []
    for condition in CONDITIONS:
        case = conditioned(base, condition)
        for method, of in (("fedsrd", of_fedsrd), ("fedsrd-e", of_fedsrd_e)):
            kept = change(case, None).kept
            rows.append({"case": f"cond(B) = {condition:.0e}", "method": method, "kept": kept, "error": of(case).error})
    even = flat(shape, rank, clients)
    terms = stack_pairs([LoraPair(p.A, p.B) for p in even.pairs()])
    for kernel in ("gram", "qr"):
        cut = truncate(terms, rank=rank, kernel=kernel)
        found = of_cut(even, cut)
        case_name = f"flat spectrum, {kernel} asked, {cut.kernel} used"
        rows.append({"case": case_name, "method": "flexlora", "error": found.error, "excess": found.excess})
    return rows
