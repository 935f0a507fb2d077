"""Server kernels as `python -m benchmarks aggregate` runs them: what each must at least do, and what it replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import accuracy
from benchmarks.workload import DENSITY, Module
from fedloom.lora.lowrank import FactorChange, ProductSum, Truncation
from fedloom.lora.pair import LoraPair
from fedloom.studies.estimate import machine

TAU = 0.9


@dataclass(frozen=True, slots=True)
class Work:
    """Operations by precision and bytes that a kernel cannot do without, for one module."""

    float64: float
    float32: float
    bytes: float

    def seconds(self, rates: machine.Rates) -> float:
        """The floor: arithmetic at the rate of matrix products, or traffic at that of a copy where it takes longer."""
        return max(self.float64 / rates.float64 + self.float32 / rates.float32, self.bytes / rates.bytes)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One method's kernel, what it must at least do, the dense computation it stands for, and its deviation."""

    run: Callable[[Module], object]
    work: Callable[[Module], Work]
    dense: Callable[[Module], object] | None = None
    check: Callable[[Module], accuracy.Deviation] | None = None
    equal_ranks: bool = False


def fedit(case: Module) -> LoraPair:
    """Σ w_k A_k and Σ w_k B_k; adapters of lower rank count as padded with zeros."""
    a, b = torch.zeros_like(case.pair.A), torch.zeros_like(case.pair.B)
    for client in case.clients:
        a[: client.pair.rank].add_(client.pair.A, alpha=client.weight)
        b[:, : client.pair.rank].add_(client.pair.B, alpha=client.weight)
    return LoraPair(a, b)


def fedsrd(case: Module) -> FactorChange:
    """The even round, which changes A: with a best rank-r approximation."""
    return accuracy.change(case, case.pair.rank)


def fedsrd_e(case: Module) -> FactorChange:
    """The even round without one."""
    return accuracy.change(case, None)


def florist(case: Module) -> Truncation:
    """The least rank that holds the share TAU of the energy."""
    return _sum(case).truncate(energy=TAU)


def flexlora(case: Module) -> Truncation:
    """The best approximation of the largest client's rank."""
    return _sum(case).truncate(rank=case.pair.rank)


def _sum(case: Module) -> ProductSum:
    total = ProductSum(case.pair.shape)
    for client in case.clients:
        total.add(client.pair, client.weight)
    return total


def dense_fedsrd(case: Module) -> Tensor:
    """As the authors' code does it: the m × n mean, its full SVD, the pseudo-inverse."""
    mean = _dense_change_mean(case)
    u, s, vt = torch.linalg.svd(mean)
    r = case.pair.rank
    delta: Tensor = torch.linalg.pinv(case.pair.B) @ ((u[:, :r] * s[:r]) @ vt[:r] - case.pair.B @ case.pair.A)
    return delta


def dense_fedsrd_e(case: Module) -> Tensor:
    """The same without the SVD."""
    delta: Tensor = torch.linalg.pinv(case.pair.B) @ (_dense_change_mean(case) - case.pair.B @ case.pair.A)
    return delta


def dense_truncation(case: Module) -> tuple[Tensor, Tensor]:
    """The m × n mean and its thin SVD."""
    mean = torch.zeros(case.pair.shape, device=case.pair.A.device)
    for client in case.clients:
        mean.addmm_(client.pair.B, client.pair.A, alpha=client.weight)
    u, s, vt = torch.linalg.svd(mean, full_matrices=False)
    return u * s, vt


def two_svds(case: Module) -> tuple[Tensor, Tensor]:
    """FLoRIST as published: SVD of both stacks, SVD of the core."""
    a = torch.cat([client.weight * client.pair.A for client in case.clients])
    b = torch.cat([client.pair.B for client in case.clients], dim=1)
    ub, sb, vbt = torch.linalg.svd(b, full_matrices=False)
    ua, sa, vat = torch.linalg.svd(a, full_matrices=False)
    up, sp, vpt = torch.linalg.svd((sb[:, None] * vbt) @ (ua * sa))
    share = sp.square().cumsum(0) / sp.square().sum()
    p = int((share < TAU).sum()) + 1
    return ub @ (up[:, :p] * sp[:p]), vpt[:p] @ vat


def _dense_change_mean(case: Module) -> Tensor:
    mean = torch.zeros(case.pair.shape, device=case.pair.A.device)
    for b, a, weight in accuracy.changed(case):
        mean.addmm_(b, a, alpha=weight)
    return mean


def work_fedit(case: Module) -> Work:
    """Every factor read once, the mean read and written with it."""
    values = sum(client.pair.A.numel() + client.pair.B.numel() for client in case.clients)
    return Work(0.0, 2.0 * values, 4.0 * 3 * values)


def work_truncation(case: Module) -> Work:
    """Half of two Gram matrices, one product of each with the leading components, the two leading factors.

    In float32 but for what is R × R, although the kernel takes float64 where it has to.
    """
    (m, n), kept = case.pair.shape, case.pair.rank
    stacked = sum(client.pair.rank for client in case.clients)
    single = (stacked**2 + 2.0 * stacked * kept) * (m + n)
    return Work(6.0 * stacked**2 * kept, single, 4.0 * (2 * stacked + kept) * (m + n))


def work_fedsrd_e(case: Module) -> Work:
    """Half of one Gram matrix, its eigenvalues and its inverse, two sparse products a client, one dense product.

    In float32 but for what is r × r.
    """
    (m, n), r, count = case.pair.shape, case.pair.rank, len(case.clients)
    elements = DENSITY * r * count
    single = r**2 * m + 2 * r * elements * (m + n) + 2 * r**2 * n
    return Work(7 / 3 * r**3 + 2 * r**3 * count, single, 4.0 * r * (m + 3 * n) + 12 * elements * (m + n))


def work_fedsrd(case: Module) -> Work:
    """Both Gram matrices of the stacks (sparse but for one block each) in float64, the core, FedSRD-e's products."""
    (m, n), r, count = case.pair.shape, case.pair.rank, len(case.clients)
    stacked = r * count
    base = work_fedsrd_e(case)
    pairs = (DENSITY * stacked) ** 2 * (m + n)
    double = (r**2 + 2 * r * DENSITY * stacked) * (m + n) + pairs + 9 * stacked**3 + 2 * stacked**2 * r
    single = 2 * r * DENSITY * stacked * n + 2 * r**2 * n
    return Work(base.float64 + double, single, base.bytes)


KERNELS: dict[str, Kernel] = {
    "fedit": Kernel(fedit, work_fedit),
    "fedsrd": Kernel(fedsrd, work_fedsrd, dense_fedsrd, accuracy.of_fedsrd, equal_ranks=True),
    "fedsrd-e": Kernel(fedsrd_e, work_fedsrd_e, dense_fedsrd_e, accuracy.of_fedsrd_e, equal_ranks=True),
    "florist": Kernel(florist, work_truncation, dense_truncation, lambda case: accuracy.of_cut(case, florist(case))),
    "flexlora": Kernel(flexlora, work_truncation, dense_truncation, lambda case: accuracy.of_cut(case, flexlora(case))),
}
