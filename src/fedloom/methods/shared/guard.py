"""A guard on the server's step: what the clients do after a step says whether it was too long.

After a step D of the server the clients train on, and M = Σ p_k Δ_k is where they want to go from there. Over the
elements of D,

    c = Σ D M / Σ |D M|

is 1 where they go on in its direction and −1 where they undo it. The gain γ, which every step is multiplied with,
begins at 1 and follows: γ ← min(1, γ 2^c) for c ≥ 0, and γ 4^c below, so that it falls faster than it rises. Where
c < −1/2 most of the step was wrong: it is taken back, and nothing else is done in that round.

Amplified steps need it, where few elements carry the change of all. As long as clients agree with them c is near 1 and
nothing changes; at rates at which they overshoot, c turns negative at once (docs/LOG.md has the figures).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.compress.entries import Entry, Sparse, floats, some_floats, to_dense
from fedloom.compress.marks import Marks
from fedloom.compress.seeds import derived_seed
from fedloom.lora.pair import LoraPair
from fedloom.methods.method import Aggregate, Context, State, Update
from fedloom.methods.shared.whole import widen_change

GAIN = "step_gain"
"""Key of a module's gain in the server's memory ("module/step_gain"), and of the mean gain among the numbers."""
UNDONE = "max_step_undone"
"""Among a round's numbers where the last step was taken back: 1."""

_BEFORE = "before"  # in the server's memory: the adapter that the last round began with
_AT, _BY = "step_at", "step_by"  # in the server's memory: where the last step changed a tensor, and by how much
_RISE, _FALL = 2.0, 4.0
_WRONG = -0.5  # below it three quarters of what clients do with the step undo it


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """What the last broadcast changed in one tensor: flat positions (increasing) and values (float32)."""

    positions: Tensor
    values: Tensor
    marks: Marks

    @classmethod
    def of(cls, positions: Tensor, values: Tensor, numel: int) -> Step:
        """The step in a tensor of so many elements."""
        return cls(positions, values, Marks.of(positions.numpy(), numel))

    def add(self, total: Tensor, entry: Entry, weight: float) -> None:
        """Add, for each of these positions, weight times what an entry of the same shape has there."""
        if not isinstance(entry, Sparse):
            total.add_(to_dense(entry).flatten()[self.positions], alpha=weight)
            return
        hit, places = map(torch.from_numpy, self.marks.find(entry.positions.numpy()))  # most of it lies elsewhere
        values = some_floats(entry.values, hit)
        total.index_copy_(0, places, total.index_select(0, places).add_(values, alpha=weight))


@dataclass(frozen=True, eq=False, slots=True)
class Verdict:
    """c of the last step, and the gain of each module from now on."""

    agreement: float
    gains: Mapping[str, float]

    @property
    def wrong(self) -> bool:
        """Whether the last step is to be taken back."""
        return self.agreement < _WRONG

    @property
    def stats(self) -> dict[str, float]:
        """Numbers worth recording."""
        return {GAIN: sum(self.gains.values()) / max(len(self.gains), 1)}


class Witness:
    """Sees the updates of a round go by, and judges the last step by them. Without `on` it finds every step good."""

    def __init__(self, state: State, on: bool) -> None:
        self.state = state
        self.on = on
        held = state.memory
        sizes = {name: tensor.numel() for name, tensor in state.adapter.tensors().items()}
        names = [name for name in sizes if on and f"{name}/{_AT}" in held]
        self.steps = {name: Step.of(held[f"{name}/{_AT}"], held[f"{name}/{_BY}"], sizes[name]) for name in names}
        self.moves = {name: torch.zeros_like(step.values) for name, step in self.steps.items()}

    def watch(self, updates: Iterable[Update]) -> Iterator[Update]:
        """The same updates, seen.

        One that was begun before the last step says nothing of it: it repeats what led there.
        """
        ranks = self.state.adapter.ranks()
        for update in updates:
            for name, step in self.steps.items():
                if name in update.entries and not update.staleness:
                    module, _, part = name.rpartition("/")
                    change = widen_change(update.entries[name], part, ranks[module])
                    step.add(self.moves[name], change, update.weight)
            yield update

    def judge(self) -> Verdict:
        """What the updates say."""
        sums, sizes = [], []
        for name, step in self.steps.items():
            product = step.values.double().mul_(self.moves[name])
            sums.append(float(product.sum()))
            sizes.append(float(product.abs_().sum()))
        whole = math.fsum(sizes)
        return follow(self.state, math.fsum(sums) / whole if whole else 0.0)

    def remember(self, verdict: Verdict, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
        """What the server keeps for the next round, given what it broadcasts in this one."""
        if not self.on:
            return {}
        kept = self.forget(verdict)
        for name, entry in entries.items():
            sparse = isinstance(entry, Sparse)
            flat = floats(entry.values) if sparse else to_dense(entry).flatten()
            kept[f"{name}/{_AT}"] = entry.positions if isinstance(entry, Sparse) else flat.nonzero().flatten()
            kept[f"{name}/{_BY}"] = flat if sparse else flat[kept[f"{name}/{_AT}"]]
        return kept

    def forget(self, verdict: Verdict) -> dict[str, Tensor]:
        """The gains, and no last step: every step is judged once."""
        empty = {_AT: torch.zeros(0, dtype=torch.int64), _BY: torch.zeros(0)}
        return {f"{name}/{key}": nothing for name in self.steps for key, nothing in empty.items()} | store(verdict)

    def take_back(self, verdict: Verdict, context: Context) -> Aggregate:
        """The last step with its sign turned, as the round's broadcast."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.adapter.tensors().items()}
        entries: dict[str, Entry] = {}
        for name, step in self.steps.items():
            if step.values.numel():
                seed = derived_seed(context.seed, "guard", context.round, name)
                entries[name] = Sparse(shapes[name], step.positions, context.quantize(-step.values, seed))
        memory = {**self.state.memory, **self.forget(verdict)}
        return Aggregate(entries, memory, {**verdict.stats, UNDONE: 1.0})


def follow(state: State, agreement: float) -> Verdict:
    """The gains after a step with which the clients agreed so far."""
    factor = (_RISE if agreement >= 0 else _FALL) ** agreement
    one = torch.tensor(1.0)
    gains = {module: state.memory.get(f"{module}/{GAIN}", one).item() for module in state.adapter}
    return Verdict(agreement, {module: min(1.0, gain * factor) for module, gain in gains.items()})


def store(verdict: Verdict) -> dict[str, Tensor]:
    """The gains, as the server keeps them."""
    return {f"{module}/{GAIN}": torch.tensor(gain) for module, gain in verdict.gains.items()}


def judge_products(state: State, wanted: Mapping[str, LoraPair]) -> Verdict:
    """The verdict where the broadcast is a sum of products: c is the cosine of M = ΔW* − B A and D = B A − B′ A′.

    wanted: ΔW* of every module. B′ A′: the adapter that the last round began with, as `remember_adapter` kept it.
    """
    agreed, sizes = [], []
    for module, target in wanted.items():
        held, key = state.adapter[module], f"{module}/{_BEFORE}"
        if f"{key}_A" not in state.memory:
            continue
        before = LoraPair(state.memory[f"{key}_A"], state.memory[f"{key}_B"])
        lead = LoraPair(
            target.A[: held.rank], target.B[:, : held.rank]
        )  # what clients go on with, and nearly all of it
        inner = inner_products([lead, held, before])
        move, step = inner.new_tensor([1.0, -1.0, 0.0]), inner.new_tensor([0.0, 1.0, -1.0])
        agreed.append(float(move @ inner @ step))
        sizes.append(math.sqrt(max(float(move @ inner @ move), 0.0) * max(float(step @ inner @ step), 0.0)))
    whole = math.fsum(sizes)
    return follow(state, max(-1.0, min(1.0, math.fsum(agreed) / whole)) if whole else 0.0)


def judge_step(state: State, now: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Verdict:
    """The verdict where the server holds more than it broadcasts: D leads to `now`, `wanted` is the clients' mean M."""
    agreed = whole = 0.0
    for name, tensor in before_step(state).items():
        product = (now[name] - tensor).double() * wanted[name].double()
        agreed, whole = agreed + float(product.sum()), whole + float(product.abs().sum())
    return follow(state, agreed / whole if whole else 0.0)


def before_step(state: State) -> dict[str, Tensor]:
    """What was there before the last step, as `remember_before` kept it; empty where there is none to judge."""
    kept = {f"{m}/{part}": state.memory.get(f"{m}/{_BEFORE}_{part}") for m in state.adapter for part in ("A", "B")}
    return {name: tensor for name, tensor in kept.items() if tensor is not None}


def remember_adapter(state: State, verdict: Verdict) -> dict[str, Tensor]:
    """What the server keeps for the next round, where its broadcast is a sum of products."""
    return store(verdict) | remember_before(state.adapter.tensors())


def remember_before(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors that a step begins with."""
    return {
        f"{module}/{_BEFORE}_{part}": t for name, t in factors.items() for module, _, part in [name.rpartition("/")]
    }


def inner_products(pairs: Sequence[LoraPair]) -> Tensor:
    """⟨B_i A_i, B_j A_j⟩ of all pairs of one shape, float64."""
    ranks = [pair.rank for pair in pairs]
    b, a = torch.cat([pair.B for pair in pairs], 1).double(), torch.cat([pair.A for pair in pairs]).double()
    terms = (b.T @ b) * (a @ a.T)
    return torch.stack(
        [torch.stack([t.sum() for t in torch.split(row, ranks, 1)]) for row in torch.split(terms, ranks)]
    )
