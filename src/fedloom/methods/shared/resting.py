"""The factors between which a core is trained where they follow from what every site has: no byte of them travels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.lora.resting import leading_pair, random_pair
from fedloom.methods.method import State
from fedloom.methods.shared.whole import whole_rank

Factors = Literal["svd", "random"]
ReadWeight = Callable[[str], Tensor]
"""Module → its base weight (m, n)."""


@dataclass(frozen=True, eq=False, slots=True)
class Resting:
    """State → the resting pairs of its modules, at the server's ranks: a `Method.core`.

    factors: "svd", the leading singular vectors of the base weights, or "random", signs. scale: length of U's columns.
    known: (module, rank) → the pair, once it has been made. Of base weights it is there from the start, or never.
    """

    factors: Factors
    scale: float
    known: dict[tuple[str, int], LoraPair] = field(default_factory=dict)

    def __call__(self, state: State) -> LoraState:
        return LoraState(
            {module: self._pair(module, pair, whole_rank(state, module)) for module, pair in state.adapter.items()}
        )

    def _pair(self, module: str, adapter: LoraPair, rank: int) -> LoraPair:
        key = module, rank
        if key not in self.known:
            if self.factors == "svd":
                raise ConfigError(
                    f"method.factors = 'svd' needs the base weight of {module} at rank {rank}, and this federation "
                    "was given no base model: call Method.on_base first, or take method.factors = 'random'"
                )
            self.known[key] = self._scaled(random_pair(adapter.shape, rank, module))
        return self.known[key]

    def _scaled(self, pair: LoraPair) -> LoraPair:
        return LoraPair(pair.A, pair.B * self.scale)

    def on_base(self, adapter: LoraState, read: ReadWeight) -> Resting:
        """The same with the pairs of this adapter's modules and ranks.

        A weight that has a shape alone (torch's meta device), as in an estimate of sizes, counts as random.
        """
        if self.factors != "svd":
            return self
        known = {}
        for module, pair in adapter.items():
            weight, rank = read(module), pair.rank
            found = random_pair(pair.shape, rank, module) if weight.is_meta else leading_pair(weight, rank, module)
            known[module, rank] = self._scaled(found)
        return replace(self, known=known)

    def begin(self, adapter: LoraState) -> LoraState:
        """The adapter that a run begins with: B = U, and A = R V with R = 0.

        adapter: the seeded start. Raises ConfigError for one that has learnt something, which no core can say.
        """
        if any(bool(pair.B.any()) for pair in adapter.values()):
            raise ConfigError(
                "model.adapter names an adapter to go on from, and a core between resting factors cannot say it: "
                "merge it into the base model first, or take another method"
            )
        resting = self(State(adapter))
        return LoraState({m: LoraPair(torch.zeros_like(pair.A), resting[m].B) for m, pair in adapter.items()})
