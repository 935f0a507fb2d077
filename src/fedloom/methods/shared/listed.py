"""The most important elements of a change, listed once for all trials of what a budget has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.compress.budget import (
    SAMPLE,
    SAMPLED,
    BudgetFill,
    Room,
    cost_of_sample,
    expect_by_sample,
    fill_budget,
    value_bits,
)
from fedloom.compress.entries import Sparse, count
from fedloom.compress.seeds import derived_seed
from fedloom.compress.sparsify import factor_norms, kept_count, scratch, select_largest, shortlist
from fedloom.lora.lowrank import map_modules
from fedloom.lora.pair import LoraState
from fedloom.methods.method import Context, State
from fedloom.methods.shared.few import keep_few

_ROOM = 1.2  # a shortlist holds this many times the elements asked for, so that a slightly larger trial finds them
_EVERY = 11  # no multiple or divisor of how many modules a layer has: all of them, and all depths, are in a sample


@dataclass(frozen=True, eq=False, slots=True)
class Delta:
    """A change of factor `part` ("A" or "B"): after − before, or `after` itself.

    other: what it is multiplied with; without it an element is judged by its magnitude.
    step: what is sent of it has its L1 norm, but at most `step` times its L2 norm; with 0 it stays as it is.
    """

    after: Tensor
    before: Tensor | None
    other: Tensor | None
    part: str
    step: float = 0.0

    def change(self) -> Tensor:
        """The change, in memory that this thread's next change may overwrite."""
        if self.before is None:
            return self.after
        return torch.sub(self.after, self.before, out=scratch.floats("change", self.after.shape))


@dataclass(frozen=True, eq=False, slots=True)
class Shortlist:
    """The candidates of a change, by position: their positions, values and scores; and the norms of the whole change.

    l2 is 0 where the norms do not matter.
    """

    shape: tuple[int, ...]
    positions: Tensor
    values: Tensor
    scores: Tensor
    l1: float
    l2: float

    @classmethod
    def of(cls, delta: Delta, most: float) -> Shortlist:
        """A shortlist of `delta` that is long enough to send the share `most` of its elements."""
        change = delta.change()
        scores = torch.abs(change, out=scratch.floats("scores", change.shape))
        l1, l2 = (scores.sum().item(), delta.step * change.norm().item()) if delta.step else (0.0, 0.0)
        if delta.other is not None:
            scores.mul_(factor_norms(delta.other, delta.part))
        positions, left = shortlist(scores, kept_count(change.numel(), most))
        values = change.flatten().index_select(0, positions)
        return cls(tuple(change.shape), positions, values, left, l1, l2)

    def entry(self, density: float, name: str, context: Context) -> Sparse:
        """The entry with the share `density` of the elements, at least one. `Delta.step` says how it is rescaled."""
        chosen = select_largest(self.scores, kept_count(count(self.shape), density))
        kept, number = self.values.index_select(0, chosen), chosen.numel()
        if number and self.l2:
            kept = kept * (min(self.l1 / number, self.l2 / math.sqrt(number)) / kept.abs().mean().item())
        seed = derived_seed(context.seed, "loom", context.round, name)
        return Sparse(self.shape, self.positions.index_select(0, chosen), context.quantize(kept, seed))


@dataclass(eq=False, slots=True)
class Lists:
    """The shortlists of all tensors. They hold enough for the density `room`, and are made anew for a larger one."""

    moved: Callable[[str], Mapping[str, Delta]]
    modules: Iterable[str]
    context: Context
    room: float = 0.0
    listed: dict[str, Shortlist] = field(default_factory=dict)

    def entries(self, density: float) -> dict[str, Sparse]:
        """The share `density` of every tensor."""
        if density > self.room or not self.listed:
            self.hold(density)
        made = map_modules(lambda name: self.listed[name].entry(density, name, self.context), self.listed)
        return dict(zip(self.listed, made, strict=True))

    def hold(self, density: float) -> None:
        """List enough for this density and a little more."""
        self.room = _ROOM * density
        pieces = map_modules(
            lambda module: {name: Shortlist.of(delta, self.room) for name, delta in self.moved(module).items()},
            self.modules,
        )
        self.listed = {name: one for piece in pieces for name, one in piece.items()}


def fill_payload(
    moved: Callable[[str], Mapping[str, Delta]], budget: int, most: float, state: State, context: Context
) -> tuple[Mapping[str, Tensor], Mapping[str, Sparse]]:
    """(memory, entries) that fill a budget of bytes with the same share of every tensor, at least one element of each.

    Where not even those fit, the tensors whose element is worth most have one, and the others none.

    Changes and importances are computed once, for a shortlist a little longer than the first guess at the density. The
    trials choose from the shortlist: a second one costs a selection and an encoding, not another look at all elements.
    """
    lists = Lists(moved, state.adapter, context)
    tensors = 2 * len(state.adapter)  # A and B of every module
    room = Room(budget, state.adapter.numel(), tensors, value_bits(context.quantize), most)
    pays = room.elements >= SAMPLED and len(state.adapter) > _EVERY
    sample = Sample.of(state.adapter, room, context) if pays else None
    before = sample.expect(moved, state.memory) if sample and SAMPLE in state.memory else state.memory
    # Listed first for the guess: asked for density 0 first, the lists would hold nothing and be made twice.
    lists.hold(room.first_guess(before))
    done = fill_budget(room, lists.entries, context.size, before)
    memory = done.memory if sample is None else sample.remember(done)
    if done.size <= budget:
        return memory, done.entries
    worth = {name: max(one.scores.tolist(), default=0.0) for name, one in lists.listed.items()}
    return memory, keep_few(done.entries, worth, budget, context.size, context.quantize)


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """Every `_EVERY`th module of an adapter: what they cost tells what all of them do, for a tenth of the work."""

    modules: Sequence[str]
    elements: int
    room: Room
    context: Context

    @classmethod
    def of(cls, adapter: LoraState, room: Room, context: Context) -> Sample:
        """The sample of an adapter, for a payload of all of it."""
        some = LoraState({module: adapter[module] for module in list(adapter)[::_EVERY]})
        return cls(tuple(some), some.numel(), room, context)

    def expect(self, moved: Callable[[str], Mapping[str, Delta]], memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the participant remembers, with what a payload of this change is likely to cost."""
        lists, density = Lists(moved, self.modules, self.context), self.room.as_before(memory)
        return expect_by_sample(memory, self._cost(lists.entries(density), density, memory))

    def remember(self, done: BudgetFill[Sparse]) -> Mapping[str, Tensor]:
        """What to remember of a payload, with what the sample took of it."""
        own = {name: entry for name, entry in done.entries.items() if name.rpartition("/")[0] in self.modules}
        return {**done.memory, SAMPLE: torch.tensor(self._cost(own, done.density, done.memory))}

    def _cost(self, entries: Mapping[str, Sparse], density: float, memory: Mapping[str, Tensor]) -> float:
        return cost_of_sample(self.room, self.elements, density, entries, self.context.size, memory)
