"""FedSRD's server step (arXiv 2510.04601, eq. 8–12): the aggregate as a change of one factor.

Side A keeps B: ΔA = B⁺ (W − B A) with W = Σ w_k (B + ΔB_k)(A + ΔA_k), or its best rank-r approximation. Side B is the
same for the transposes. With F the tall kept factor (B, or Aᵀ), G the tall moving one (Aᵀ, or B), P = F⁺F and
M_k = F⁺ΔF_k, all r × r,

    FedSRD-e:  ΔG = Σ w_k ΔG_k (P + M_k)ᵀ + G (Σ w_k (P + M_k) − P)ᵀ
    FedSRD:    the same with w_k (P + M_k) replaced by Z_k, where [Z_1 | Z_2 | …] = [w_k (P + M_k)]_k Π and Π takes the
               stack of the G + ΔG_k to what its best rank-r approximation keeps of it.

So sparse changes enter by sparse products alone; what cancels, cancels in r × r matrices of float64. With X S⁻¹ Xᵀ
the projection on the leading left directions of W, Z_k = F⁺X S⁻¹ w_k Xᵀ(F + ΔF_k): so it is done for many clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor

from fedloom.compress.entries import Entry
from fedloom.errors import ShapeError
from fedloom.lora.lowrank.gram import core, gram
from fedloom.lora.lowrank.inverse import inverse
from fedloom.lora.lowrank.leading import OVERSAMPLING, PAIRED_RANK
from fedloom.lora.lowrank.parallel import EIGEN
from fedloom.lora.lowrank.product_sum import HELD_RANK, ProductSum, streaming_cap
from fedloom.lora.lowrank.sparse import (
    Tall,
    TallChange,
    absorb,
    compiled_for,
    cross_products,
    project,
    spread,
    tall_change,
)
from fedloom.lora.lowrank.subspace import Side, leading_left
from fedloom.lora.pair import LoraPair


@dataclass(frozen=True, eq=False, slots=True)
class FactorChange:
    """The change of one factor.

    delta: float32, r × n for side A (the transpose of a contiguous n × r), m × r for side B; clients added later may
    overwrite it. kept: singular values of the other factor that were inverted. condition: largest over smallest of
    them (0 where there is none).
    """

    delta: Tensor
    kept: int
    condition: float


class ClientChange(NamedTuple):
    """One client's change of the kept and the moving factor, and its weight w."""

    kept: TallChange
    moving: TallChange
    weight: float

    @property
    def bytes(self) -> int:
        """What it takes to hold it."""
        return held_bytes(self.kept) + held_bytes(self.moving)


class ProductChange:
    """The change of `side` that brings B A as near as possible to Σ w_k (B + ΔB_k)(A + ΔA_k).

    rank: None for FedSRD-e, whose memory does not grow with the number of clients; r for FedSRD, the best rank-r
    approximation, which holds the changes while they take less memory than their recompressed sum would.
    ridge, rcond: a singular value σ of the kept factor is inverted as σ / (σ² + ridge σ_max²), and not at all below
    rcond σ_max. A kept factor of zeros, as B is at the start, gives a change of zero and kept = 0.
    """

    def __init__(
        self,
        pair: LoraPair,
        side: Literal["A", "B"],
        *,
        rank: int | None = None,
        ridge: float = 0.0,
        rcond: float = 1e-6,
    ) -> None:
        factors = {"A": pair.A.float().T, "B": pair.B.float()}
        self.side = side
        self.rank = rank
        self._fixed = factors["B" if side == "A" else "A"].contiguous()
        self._moving = factors[side]
        self._gram = None if rank is None else gram(self._fixed.T)
        self._inverse = inverse(self._fixed, ridge, rcond, self._gram)
        self._shrink = self._inverse.shrink.T.contiguous()
        self._left = self._inverse.left.T.to(torch.float32 if self._quick else torch.float64).contiguous()
        self._mixing = -self._shrink
        # Summed up client by client in FedSRD-e alone: elsewhere the memory waits until the sum is asked for.
        self._total = self._zeros() if rank is None else self._moving
        self._clients = 0
        self._held: list[ClientChange] = []
        self._spilled: ProductSum | None = None

    @property
    def cost(self) -> float:
        """About how many operations the change takes with the clients so far: products, and the core of their stack."""
        size, rank = self._fixed.shape
        stacked = 0 if self.rank is None else min(self._clients * rank, size)
        return 6.0 * rank**2 * (size + self._moving.shape[0]) + EIGEN * stacked**3

    def add(self, delta_b: Entry, delta_a: Entry, weight: float) -> None:
        """Add one client's ΔB (m × r) and ΔA (r × n). Raises ShapeError, or NumericError for NaN and infinity."""
        entries = {"B": delta_b, "A": delta_a}
        self._check(entries)
        self._clients += 1
        kept_side = "B" if self.side == "A" else "A"
        kept = tall_change(entries[kept_side], turned=kept_side == "A")
        moving = tall_change(entries[self.side], turned=self.side == "A")
        sums = self._mixing, self._total
        if self.rank is None and absorb(self._inverse.basis, self._left, self._shrink, weight, kept, moving, *sums):
            return
        client = ClientChange(kept, moving, weight)
        if self.rank is None:
            seen = self._seen(client)
            self._mixing.add_(seen)
            spread(self._total, moving, seen)
            return
        self._held.append(client)
        # From here on one sum with dense factors takes less memory than the changes one by one.
        sizes = self._fixed.shape[0] + self._moving.shape[0]
        if sum(held.bytes for held in self._held) > 4 * 2 * streaming_cap(self.rank) * sizes:
            self._spilled, self._held = self._as_sum(self.rank), []

    def solve(self) -> FactorChange:
        """The change of the factor that the clients so far make together; zero before the first."""
        if not self._clients:
            return self._changed(self._zeros(), 0, 0.0)
        if self.rank is not None:
            self._total, self._mixing = self._best(self.rank)
        # G times what was mixed joins the total for good, so that no second matrix like G is needed.
        self._total.addmm_(self._moving, self._mixing.float())
        self._mixing.zero_()
        return self._changed(self._total, self._inverse.kept, self._inverse.condition)

    def _zeros(self) -> Tensor:
        return torch.zeros_like(self._moving, memory_format=torch.contiguous_format)

    @property
    def _quick(self) -> bool:
        return self.rank is None and self._inverse.quick

    def _changed(self, total: Tensor, kept: int, condition: float) -> FactorChange:
        return FactorChange(total.T if self.side == "A" else total, kept, condition)

    def _seen(self, client: ClientChange) -> Tensor:
        """w (P + F⁺ΔF)ᵀ of a client."""
        found = project(self._inverse.basis, client.kept, quick=self._quick)  # (r, r)
        weight = client.weight
        return torch.addmm(self._shrink, found.T, self._inverse.left.T, beta=weight, alpha=weight)

    def _best(self, rank: int) -> tuple[Tensor, Tensor]:
        """(Σ ΔG_k Z_kᵀ, (Σ Z_k − P)ᵀ) by the cheapest way that serves."""
        if self._spilled is None:
            stacked = len(self._held) * self._fixed.shape[1]
            found = self._by_subspace(rank) if stacked > PAIRED_RANK else None
            # All components of a larger core cost more than a sum with dense factors.
            if found is None and stacked <= HELD_RANK:
                found = self._by_gram(rank)
            if found is not None:
                return found
        return self._by_sum(rank)

    def _by_subspace(self, rank: int) -> tuple[Tensor, Tensor] | None:
        """By the leading directions alone, at a cost linear in clients; None where they do not stand out."""
        if 3 * (rank + OVERSAMPLING) > min(self._fixed.shape[0], self._moving.shape[0]):
            return None
        left = Side(self._fixed, [held.kept for held in self._held])
        right = Side(self._moving.contiguous(), [held.moving for held in self._held])
        weights = [held.weight for held in self._held]
        found = leading_left(left, right, weights, rank)
        if found is None:
            return None
        lead, inverse = found  # X and S⁻¹
        seen = self._inverse.left @ project(self._inverse.basis, lead) @ inverse  # F⁺X S⁻¹
        return self._mixed([w * (piece @ seen.T) for w, piece in zip(weights, left.seen_by(lead), strict=True)])

    def _mixed(self, pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(Σ ΔG_k Z_kᵀ, (Σ Z_k − P)ᵀ) from the Z_kᵀ, (r, r) each."""
        total = self._zeros()
        for held, piece in zip(self._held, pieces, strict=True):
            spread(total, held.moving, piece)
        return total, torch.stack(list(pieces)).sum(0) - self._inverse.shrink.T

    def _by_gram(self, rank: int) -> tuple[Tensor, Tensor] | None:
        """By Gram matrices of all pairs of sparse changes; None where they do not serve."""
        kept, moving = [held.kept for held in self._held], [held.moving for held in self._held]
        if self._gram is None or compiled_for(self._fixed) is None or not (all_sparse(kept) and all_sparse(moving)):
            return None
        weights = self._fixed.new_tensor([held.weight for held in self._held], dtype=torch.float64)
        scale = weights.repeat_interleave(self._fixed.shape[1])
        left = stacked_gram(self._fixed, self._gram, kept) * scale * scale[:, None]  # (K r, K r)
        moving_factor = self._moving.contiguous()
        right = stacked_gram(moving_factor, gram(moving_factor.T), moving)
        found = core(left, right)
        if found is None:
            return None
        keep = min(rank, int((found.energies > found.noise).sum()))
        lead = found.right(keep)  # (K r, keep)
        seen = torch.cat([self._seen(held) for held in self._held])  # (K r, r)
        # Π applied to the stack of the w (P + F⁺ΔF)ᵀ: K pieces of (r, r), one Z_kᵀ a client.
        return self._mixed((lead @ ((lead / found.energies[:keep]).T @ (right @ seen))).chunk(len(self._held)))

    def _by_sum(self, rank: int) -> tuple[Tensor, Tensor]:
        """From dense factors: where the other two do not serve."""
        cut = self._as_sum(rank).truncate(rank=rank)
        seen = self._inverse.left @ project(self._inverse.basis, cut.pair.B)
        return (cut.pair.A.T @ seen.T.to(cut.pair.A.dtype)).float(), -self._inverse.shrink.T

    def _as_sum(self, rank: int) -> ProductSum:
        """What was spilled and what is held as one sum of products F_k G_kᵀ; float64 where F is ill-conditioned."""
        dtype = torch.float64 if self._inverse.basis.dtype == torch.float64 else torch.float32
        total = ProductSum((self._fixed.shape[0], self._moving.shape[0]), cap=streaming_cap(rank))
        if self._spilled is not None:
            total.add(self._spilled.factors(), 1.0)
        for held in self._held:
            b = self._fixed.to(dtype) + as_dense(held.kept)
            a = self._moving.to(dtype) + as_dense(held.moving)
            total.add(LoraPair(a.T, b), held.weight)
        return total

    def _check(self, entries: dict[str, Entry]) -> None:
        rank = self._fixed.shape[1]
        sizes = {"A": (rank, self._moving.shape[0]), "B": (self._fixed.shape[0], rank)}
        if self.side == "B":
            sizes = {"A": (rank, self._fixed.shape[0]), "B": (self._moving.shape[0], rank)}
        for part, entry in entries.items():
            if entry.shape != sizes[part]:
                raise ShapeError(
                    f"a change of {part} has shape {entry.shape}, expected {sizes[part]} as the global pair"
                )


def all_sparse(changes: Sequence[TallChange]) -> TypeGuard[Sequence[Tall]]:
    """Whether every change travelled sparse."""
    return all(isinstance(change, Tall) for change in changes)


def held_bytes(change: TallChange) -> int:
    """Bytes of a change's positions and values."""
    parts = (change.positions, change.values) if isinstance(change, Tall) else (change,)
    return sum(part.numel() * part.element_size() for part in parts)


def as_dense(change: TallChange) -> Tensor:
    """The change as a dense d × r tensor."""
    return change.to_dense() if isinstance(change, Tall) else change


def stacked_gram(factor: Tensor, own: Tensor, changes: Sequence[Tall]) -> Tensor:
    """SᵀS of S = [F + ΔF_1 | F + ΔF_2 | …] from FᵀF (`own`), FᵀΔF_k and ΔF_jᵀΔF_k."""
    count = len(changes)
    mixed = torch.cat([project(factor, change) for change in changes], dim=1)
    return (
        cross_products(changes)
        .add_(own.repeat(count, count))
        .add_(mixed.repeat(count, 1))
        .add_(mixed.T.repeat(1, count))
    )
