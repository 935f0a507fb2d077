"""LoRA adapters as plain tensors, and their small algebra.

Everywhere in fedloom a pair stands for the change of weight ΔW = B @ A: the LoRA scale
(alpha / r, or alpha / sqrt(r) for rsLoRA) is folded into B where a model is read
(`peft_bridge`) and divided out where one is written. So adapters of unequal rank and alpha
can be added, stacked and averaged without a thought for scales.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.compress.seeds import derived_seed
from fedloom.errors import ShapeError

PARTS = ("A", "B")


@dataclass(frozen=True, eq=False, slots=True)
class LoraPair:
    """One module's low-rank change ΔW = B @ A.

    A has shape (r, n), B (m, r); m = out features, n = in features, so y = (W0 + B A) x.
    A rank of 0 means no change.
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if self.A.dim() != 2 or self.B.dim() != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ShapeError(
                f"A of shape {tuple(self.A.shape)} and B of shape {tuple(self.B.shape)} do not make a LoRA pair: "
                "expected (r, n) and (m, r) with one r"
            )

    @property
    def rank(self) -> int:
        """r, the inner dimension."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): out and in features of the module."""
        return self.B.shape[0], self.A.shape[1]

    def part(self, name: str) -> Tensor:
        """The factor called "A" or "B"."""
        return {"A": self.A, "B": self.B}[name]


class LoraState(Mapping[str, LoraPair]):
    """Module name → pair, always iterated in sorted order of names, so that equal states give equal bytes."""

    def __init__(self, pairs: Mapping[str, LoraPair] | None = None) -> None:
        self._pairs = dict(sorted((pairs or {}).items()))

    def __getitem__(self, module: str) -> LoraPair:
        return self._pairs[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        return f"LoraState({len(self)} modules, {self.numel():,} values, ranks {sorted(set(self.ranks().values()))})"

    def numel(self) -> int:
        """Number of values in all factors."""
        return sum(pair.A.numel() + pair.B.numel() for pair in self.values())

    def ranks(self) -> dict[str, int]:
        """Module name → rank."""
        return {module: pair.rank for module, pair in self.items()}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module name → (m, n)."""
        return {module: pair.shape for module, pair in self.items()}

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The names used on the wire, "module/A" and "module/B" (or "module/<prefix>A" …), → tensor."""
        return {f"{module}/{prefix}{part}": pair.part(part) for module, pair in self.items() for part in PARTS}

    def in_memory(self) -> LoraState:
        """The state in the computer's own memory: a factor that lies on a GPU is copied, once; others stay."""
        return self.map(lambda pair: LoraPair(pair.A.cpu(), pair.B.cpu()))

    def map(self, function: Callable[[LoraPair], LoraPair]) -> LoraState:
        """A state with `function` applied to every pair."""
        return LoraState({module: function(pair) for module, pair in self.items()})


def from_tensors(tensors: Mapping[str, Tensor], prefix: str = "") -> LoraState:
    """The inverse of `LoraState.tensors`; other names are ignored. Raises ShapeError for half a pair."""
    ends = tuple(f"/{prefix}{part}" for part in PARTS)
    modules = {name.rpartition("/")[0] for name in tensors if name.endswith(ends)}
    missing = [module + end for module in modules for end in ends if module + end not in tensors]
    if missing:
        raise ShapeError(f"no tensor called {min(missing)}: every module needs both A and B")
    return LoraState({module: LoraPair(tensors[module + ends[0]], tensors[module + ends[1]]) for module in modules})


def initial_state(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], seed: int) -> LoraState:
    """The usual LoRA start: A uniform in ±1/sqrt(n), B zero, drawn on the CPU from (seed, module) alone.

    The first rows of A are the same for every rank, so that a client of rank q holds the first q rows
    of what a client of a higher rank holds.
    """
    return LoraState({module: _initial_pair(m, n, ranks[module], seed, module) for module, (m, n) in shapes.items()})


def _initial_pair(m: int, n: int, rank: int, seed: int, module: str) -> LoraPair:
    generator = torch.Generator().manual_seed(derived_seed(seed, "lora-init", module))
    rows = [torch.empty(n).uniform_(-1.0, 1.0, generator=generator) for _ in range(rank)]
    a = torch.stack(rows) / n**0.5 if rows else torch.zeros(0, n)
    return LoraPair(a, torch.zeros(m, rank))


def narrow(state: LoraState, ranks: Mapping[str, int]) -> LoraState:
    """The state cut to each module's first `ranks[module]` components; a module that `ranks` lacks stays whole."""
    return LoraState(
        {module: LoraPair(p.A[: ranks.get(module)], p.B[:, : ranks.get(module)]) for module, p in state.items()}
    )


def subset(state: LoraState, modules: Collection[str]) -> LoraState:
    """The state of these modules alone."""
    return LoraState({module: pair for module, pair in state.items() if module in modules})


def module_of(name: str) -> str:
    """The module that a tensor's name on the wire, "module/part", belongs to."""
    return name.rpartition("/")[0]


def stack(states: list[LoraState]) -> LoraState:
    """The state whose ΔW is the sum of theirs: [B1 | B2 | …] [A1; A2; …], ranks added, nothing rounded.

    A module may be absent from some of the states.
    """
    modules = {module for state in states for module in state}
    return LoraState({module: stack_pairs([s[module] for s in states if module in s]) for module in modules})


def stack_pairs(pairs: list[LoraPair]) -> LoraPair:
    """One pair whose product is the sum of the products; a single pair is that pair itself."""
    if len({pair.shape for pair in pairs}) != 1:
        raise ShapeError(f"pairs of shapes {[pair.shape for pair in pairs]} cannot be stacked: they must agree")
    if len(pairs) == 1:
        return pairs[0]
    return LoraPair(torch.cat([pair.A for pair in pairs]), torch.cat([pair.B for pair in pairs], dim=1))


def core_matrix(a: Tensor, v: Tensor) -> Tensor:
    """The matrix R (r × r) for which R V is nearest to A: A Vᵀ (V Vᵀ)⁺, in float64; zero where V is zero."""
    rows = v.double()
    matrix: Tensor = a.double() @ rows.T @ torch.linalg.pinv(rows @ rows.T, hermitian=True)
    return matrix.to(a.dtype)


def digest(state: LoraState) -> str:
    """32 hex digits that differ when any name, shape or bit of the state differs."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in state.tensors().items():
        hasher.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
