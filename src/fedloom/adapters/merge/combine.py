"""One module of every adapter → one pair, by the server's step of a method, and what each step cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.adapters.settings import pad_to_rank_one
from fedloom.compress.entries import dense_entry
from fedloom.errors import ConfigError, NumericError
from fedloom.lora.lowrank import frobenius_norm, truncate
from fedloom.lora.pair import LoraPair, LoraState, stack, stack_pairs
from fedloom.methods.foreign import is_foreign
from fedloom.methods.method import FROZEN, Context, Method, State, Update
from fedloom.methods.shared.components import read_pairs
from fedloom.methods.table import METHODS, build, method_entry, method_name, offline_methods


@dataclass(frozen=True, slots=True)
class Recipe:
    """How modules are combined.

    method: one of `offline_methods`, or of another package with that fact. rank: flexlora's (the largest that went in,
    by default). energy: florist's share of Σσ² to keep (0.99 by default). max_rank: cap on the rank of whatever comes
    out. dtype: of the factors as stored.
    """

    method: str = "florist"
    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        known = method_name(self.method) in METHODS or is_foreign(self.method)
        if not known or not build(self.method).facts.stateless:
            raise ConfigError(
                f"--method {self.method} is unknown, or its server step needs the state of earlier rounds; "
                f"adapters can be merged with {', '.join(offline_methods())}"
            )
        for option, value in (("rank", self.rank), ("energy", self.energy)):
            if value is not None and build(self.method).facts.truncates != option:
                owner = next(name for name in offline_methods() if build(name).facts.truncates == option)
                raise ConfigError(
                    f"--{option} belongs to {owner}: the rank of {self.method} follows from the adapters; "
                    f"use --method {owner}, or --max-rank for a cap"
                )
        for option, rank in (("rank", self.rank), ("max-rank", self.max_rank)):
            if rank is not None and rank < 1:
                raise ConfigError(f"--{option} is {rank}: expected at least 1")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ConfigError(f"--energy is {self.energy}: expected 0 < energy ≤ 1")

    def build(self) -> Method:
        """The method, with its preset for this use where it has one."""
        preset = {"preset": "offline"} if "offline" in method_entry(self.method).presets else {}
        energy = {} if self.energy is None else {"tau": self.energy}
        return build(self.method, {**preset, **energy})


@dataclass(frozen=True, slots=True)
class Costs:
    """Frobenius norms of one module. exact: of Σ p_k ΔW_k. error: of what is stored, less the exact sum.

    cap: of what a cap on the rank cut off. rounding: of what storing fewer bits changed.
    """

    exact: float
    error: float
    cap: float
    rounding: float


def combine_module(
    recipe: Recipe, module: str, pairs: Sequence[LoraPair], shares: Sequence[float]
) -> tuple[LoraPair, Costs]:
    """The pair to store, of type recipe.dtype, and its costs.

    pairs: the module in those adapters that have it; shares: their p_k, which sum to less than 1 where some lack it.
    An adapter without the module changes nothing there. Raises ConfigError for unequal ranks where the method needs
    equal ones, NumericError where float16 overflows.
    """
    method = recipe.build()
    ranks = [pair.rank for pair in pairs]
    if len(set(ranks)) > 1 and not method.facts.unequal_ranks:
        raise ConfigError(
            f"{method.name} needs adapters of equal rank, and module {module} has ranks {', '.join(map(str, ranks))}; "
            "use florist, flexlora, flora or fedit"
        )
    whole = server_step(method, module, pairs, shares, recipe.rank or max(ranks))
    kept = cap_rank(whole, recipe.max_rank)
    stored = balance_exactly(pad_to_rank_one(kept))
    stored = LoraPair(stored.A.to(recipe.dtype), stored.B.to(recipe.dtype))
    if not all(bool(torch.isfinite(stored.part(part)).all()) for part in "AB"):
        raise NumericError(f"module {module} is too large for {recipe.dtype}: store it as bf16 or fp32")
    exact = [LoraPair(pair.A, pair.B.double() * share) for pair, share in zip(pairs, shares, strict=True)]
    return stored, Costs(
        exact=frobenius_norm(stack_pairs(exact)),
        error=distance_to_sum(exact, stored),
        cap=0.0 if recipe.max_rank is None or kept is whole else distance_to_sum([whole], kept),
        rounding=0.0 if recipe.dtype == torch.float32 else distance_to_sum([kept], stored),
    )


def server_step(method: Method, module: str, pairs: Sequence[LoraPair], shares: Sequence[float], rank: int) -> LoraPair:
    """All that the method would broadcast in a first round, as one pair. The server's adapter is zeros of `rank`.

    The method sees shares that sum to 1, and their true sum scales its result. So a mean of factors is scaled once, not
    once in A and once in B.
    """
    m, n = pairs[0].shape
    present = sum(shares)
    server = State(LoraState({module: LoraPair(torch.zeros(rank, n), torch.zeros(m, rank))}))
    updates = [
        Update(str(k), share / present, {f"{module}/{part}": dense_entry(pair.part(part)) for part in "AB"})
        for k, (pair, share) in enumerate(zip(pairs, shares, strict=True))
    ]
    entries = method.aggregate(server, updates, Context(1, 0, _unrounded)).entries
    result = stack([read_pairs(entries), read_pairs(entries, FROZEN)])[module]
    return LoraPair(result.A, result.B * present)


def cap_rank(pair: LoraPair, max_rank: int | None) -> LoraPair:
    """The best approximation of at most rank max_rank and min(m, n). The second bound loses nothing."""
    cap = min(*pair.shape, max_rank or pair.rank)
    return pair if pair.rank <= cap else truncate(pair, rank=cap).pair


def balance_exactly(pair: LoraPair) -> LoraPair:
    """The pair with its factors brought to about one size, so that neither underflows in half precision.

    Components are scaled by powers of two, so the product is the same, bit for bit.
    """
    size_a, size_b = pair.A.norm(dim=1), pair.B.norm(dim=0)
    live = (size_a > 0) & (size_b > 0)
    power = torch.where(live, (size_b / size_a).log2() / 2, 0.0).round().exp2()
    return LoraPair(pair.A * power[:, None], pair.B / power)


def distance_to_sum(terms: Sequence[LoraPair], pair: LoraPair) -> float:
    """‖Σ terms − pair‖_F."""
    return frobenius_norm(stack_pairs([*terms, LoraPair(pair.A, -pair.B)]))


def _unrounded(values: Tensor, seed: int) -> Tensor:
    return values
