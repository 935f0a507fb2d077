"""loom: both factors, sparse and few bits a value, both ways, within a budget of bytes (fedloom's own; docs/loom.md).

Clients send the signs of the most important elements of ΔA and ΔB. The server averages them and broadcasts the signs of
the most important elements of the mean; what it leaves out waits for the next rounds. How many elements travel follows
from the budget alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from fedloom.errors import ConfigError
from fedloom.lora import LoraState, derived_seed, from_tensors, stack
from fedloom.lowrank import over_modules
from fedloom.method import Aggregate, Context, Entries, Facts, Method, State, Update, adopt_leading
from fedloom.methods.averaging import weighted_mean
from fedloom.methods.components import components
from fedloom.sparsify import kept_count, largest, reach, scratch, shortlist
from fedloom.tensors import Quantized, Sparse, count, to_dense

COST = "cost"
"""The name in a participant's memory of what its last payload took, over the entropy of positions and values."""

LEAST = "least"
"""The name in a participant's memory of what a tensor takes of which one element is sent, in bytes."""

_TRIES = 5
_AIM = 0.99  # of the budget: what is aimed at
_USED = 0.95  # of the budget: enough
_ROOM = 1.2  # densities that are listed, over the one that is asked for
_SPREAD = 1 / 8  # bits for an element of a payload, under which a smaller rank does better (docs/loom.md)
_FORMS = {0.04: "sign", 0.12: "int4", math.inf: "int8"}  # of values, up to this share of dense fp32


@dataclass(frozen=True, slots=True)
class Dial:
    """Bytes of a client's turn, both ways: `share` of dense fp32 or, where that is 0, `size`; `up` of them go up.

    most: the share of a tensor's elements that is sent at most. taper: how much the first rounds take from the last.
    """

    share: float
    size: int
    up: float
    most: float
    taper: float

    def bytes(self, adapter: LoraState, direction: str, context: Context) -> int:
        """What a payload in this direction may take, where `adapter` is what dense fp32 would send."""
        both = self.share * 2 * 4 * adapter.numel() if self.share else self.size
        part = self.up if direction == "up" else (1.0 - self.up) / context.downloads
        return int(both * part * self.weight(context.round, context.num_rounds))

    def weight(self, round: int, num_rounds: int) -> float:
        """What this round's bytes are, over the mean of all rounds: from 1 + taper it falls to 1 − taper."""
        done = (round - 0.5) / num_rounds if num_rounds else 0.5
        return 1.0 + self.taper * (1.0 - 2.0 * min(done, 1.0))


def loom(
    *,
    budget: str | int = "1%",
    upload_share: float = 0.42,
    step: float = 3.0,
    server_residual: float = 0.9,
    max_density: float = 1.0,
    taper: float = 0.0,
    importance: bool = True,
) -> Method:
    """The most important elements of both factors, up and down, as signs where the budget is small.

    budget: bytes of a client's turn, up and down together and on the mean of all rounds, or a share of dense fp32
    ("1%"); a payload has one element of every tensor even where there is no room for it. upload_share: of the budget,
    the part that goes up. taper: a round's bytes fall in a line from 1 + taper times the mean to 1 − taper times.
    step: what a client sends of a tensor has the L1 norm of its whole change, but at most `step` times its L2 norm.
    server_residual: the share of what a broadcast leaves out that is added to the next one.
    max_density: the share of a tensor's elements that is sent at most, whatever the budget.
    importance: whether an element counts for what it changes in ΔW (FedSRD, eq. 4–5), not for its magnitude alone.
    Values travel as signs up to 4 % of dense fp32 and with a budget in bytes, in 4 bits up to 12 %, else in 8, unless
    wire.values says otherwise.
    """
    dial = Dial(*_amount(budget), upload_share, max_density, taper)
    for key, share in (("upload_share", upload_share), ("max_density", max_density)):
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"method.{key} is {share}: expected more than 0 and at most 1")
    for key, share in (("server_residual", server_residual), ("taper", taper)):
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"method.{key} is {share}: expected 0 to 1")
    if step <= 0.0:
        raise ConfigError(f"method.step is {step}: expected more than 0")
    return Method(
        name="loom",
        facts=Facts(
            paper="fedloom (docs/loom.md)",
            unequal_ranks=True,
            sends="important elements of ΔA and ΔB",
            receives="important elements of ΔA and ΔB",
            keeps="server: what it did not send",
            broadcasts="elements",
        ),
        compress=partial(send_signs, dial, step, importance),
        aggregate=partial(broadcast_signs, dial, server_residual, importance),
        receive=add_to_all,
        adopt=adopt_all,
        advise=partial(thin, dial),
        values=next(form for most, form in _FORMS.items() if dial.share <= most),
    )


def _amount(budget: str | int) -> tuple[float, int]:
    """(share, 0) of "1%", (0, bytes) of a whole number."""
    text = str(budget).strip()
    try:
        share, size = (float(text[:-1]) / 100, 0) if text.endswith("%") else (0.0, int(text))
    except ValueError:
        share, size = 0.0, 0
    if not (math.isfinite(share) and (share > 0 or size > 0)):
        raise ConfigError(f'method.budget is {budget!r}: expected a share of dense fp32 such as "1%", or bytes')
    return share, size


def thin(dial: Dial, adapter: LoraState, context: Context) -> str:
    """Where a payload has few bits for so many elements: that, and what helps."""
    mean = replace(context, num_rounds=0)
    bits = 8 * min(dial.bytes(adapter, way, mean) for way in ("up", "down")) / max(adapter.numel(), 1)
    if bits >= _SPREAD:
        return ""
    return (
        f"method.budget leaves a payload {bits:.2g} bits for every element of the adapter: a smaller lora.r with a "
        "higher training.learning_rate, or a larger budget, may well end higher (docs/loom.md)"
    )


def send_signs(
    dial: Dial, step: float, importance: bool, state: State, after: LoraState, context: Context
) -> tuple[Mapping[str, Tensor], Entries]:
    """The most important elements of ΔA and ΔB, as many as the budget has room for."""

    def moved(module: str) -> dict[str, Delta]:
        before, now = state.adapter[module], after[module]
        return {
            f"{module}/A": Delta(now.A, before.A, now.B if importance else None, "A", step),
            f"{module}/B": Delta(now.B, before.B, before.A if importance else None, "B", step),
        }

    return filled(moved, dial.bytes(state.adapter, "up", context), dial.most, state, context)


def broadcast_signs(
    dial: Dial, residual: float, importance: bool, state: State, updates: Iterable[Update], context: Context
) -> Aggregate:
    """The most important elements of the clients' mean and of what earlier broadcasts left out."""
    waiting = {
        name: residual * state.memory[name] if name in state.memory else torch.zeros_like(tensor)
        for name, tensor in state.adapter.tensors().items()
    }
    sums = weighted_mean(updates, start=waiting)

    def moved(module: str) -> dict[str, Delta]:
        pair, a, b = state.adapter[module], sums[f"{module}/A"], sums[f"{module}/B"]
        others = (pair.B + b, pair.A) if importance else (None, None)
        return {f"{module}/A": Delta(a, None, others[0], "A"), f"{module}/B": Delta(b, None, others[1], "B")}

    memory, entries = filled(moved, dial.bytes(state.adapter, "down", context), dial.most, state, context)
    rest = {name: sums[name] - to_dense(entry) for name, entry in entries.items() if residual}
    sent = sum(entry.positions.numel() for entry in entries.values())
    return Aggregate(entries, {**state.memory, **memory, **rest}, {"density": sent / max(state.adapter.numel(), 1)})


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
    """What may be sent of a change, by position: where it is, what it is, how important; and the norms of the whole.

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
        """Enough of it to send the share `most` of the elements."""
        change = delta.change()
        scores = torch.abs(change, out=scratch.floats("scores", change.shape))
        l1, l2 = (scores.sum().item(), delta.step * change.norm().item()) if delta.step else (0.0, 0.0)
        if delta.other is not None:
            scores.mul_(reach(delta.other, delta.part))
        positions, left = shortlist(scores, kept_count(change.numel(), most))
        values = change.flatten().index_select(0, positions)
        return cls(tuple(change.shape), positions, values, left, l1, l2)

    def entry(self, density: float, name: str, context: Context) -> Sparse:
        """The share `density` of the elements, at least one; the few stand in for all, see `Delta.step`."""
        chosen = largest(self.scores, kept_count(count(self.shape), density))
        kept, number = self.values.index_select(0, chosen), chosen.numel()
        if number and self.l2:
            kept = kept * (min(self.l1 / number, self.l2 / math.sqrt(number)) / kept.abs().mean().item())
        seed = derived_seed(context.seed, "loom", context.round, name)
        return Sparse(self.shape, self.positions.index_select(0, chosen), context.quantize(kept, seed))


@dataclass(eq=False, slots=True)
class Lists:
    """The shortlists of all tensors, made anew where more is wanted than they hold; `room` is the density they hold."""

    moved: Callable[[str], Mapping[str, Delta]]
    modules: Iterable[str]
    context: Context
    room: float = 0.0
    listed: dict[str, Shortlist] = field(default_factory=dict)

    def entries(self, density: float) -> dict[str, Sparse]:
        """The share `density` of every tensor."""
        if density > self.room or not self.listed:
            self.hold(density)
        made = over_modules(lambda name: self.listed[name].entry(density, name, self.context), self.listed)
        return dict(zip(self.listed, made, strict=True))

    def hold(self, density: float) -> None:
        """List enough for this density and a little more."""
        self.room = _ROOM * density
        pieces = over_modules(
            lambda module: {name: Shortlist.of(delta, self.room) for name, delta in self.moved(module).items()},
            self.modules,
        )
        self.listed = {name: one for piece in pieces for name, one in piece.items()}


def filled(
    moved: Callable[[str], Mapping[str, Delta]], budget: int, most: float, state: State, context: Context
) -> tuple[dict[str, Tensor], dict[str, Sparse]]:
    """(memory, entries) that fill a budget of bytes.

    Every tensor sends the same share of its elements, one at least and the share `most` at most. How large a share the
    budget affords follows from the entropy of positions, times what the last payload took over that, and from what is
    due before any second element; both are remembered, so that a later payload is mostly encoded once.
    """
    total, each = max(state.adapter.numel(), 1), value_bits(context)
    cost = state.memory[COST].item() if COST in state.memory else 1.0
    lists = Lists(moved, state.adapter, context)
    lists.hold(affordable(8 * budget / total / cost, each, most))
    tensors = max(len(lists.listed), 1)
    one = state.memory[LEAST].item() if LEAST in state.memory else context.size(lists.entries(0.0)) / tensors
    least = round(one * tensors)
    best, taken = {}, 0
    for _ in range(_TRIES):
        density = affordable(8 * max(_AIM * budget - least, 0) / total / cost, each, most)
        entries = lists.entries(density)
        size = context.size(entries)
        if taken < size <= budget:
            best, taken = entries, size
        if taken > _USED * budget or (taken == size and density == most):
            break
        cost = max(8 * (size - least) / total / max(element_bits(density, each), 1e-9), 0.1)
    return {COST: torch.tensor(cost), LEAST: torch.tensor(one)}, best or lists.entries(0.0)


def value_bits(context: Context) -> float:
    """Bits of a value in the form in which values travel."""
    values = context.quantize(torch.ones(1), 0)
    return values.bits if isinstance(values, Quantized) else 8 * values.element_size()


def element_bits(density: float, each: float) -> float:
    """Bits an element, sent or not: the entropy of whether it is sent, and `each` where it is."""
    if not 0.0 < density < 1.0:
        return density * each
    return -density * math.log2(density) - (1 - density) * math.log2(1 - density) + density * each


def affordable(bits: float, each: float, most: float) -> float:
    """The density at which an element takes so many bits: `most`, or at most a half."""
    if bits >= element_bits(most, each):
        return most
    low, high = 0.0, min(most, 0.5)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if element_bits(middle, each) <= bits else (low, middle)
    return low


def add_to_all(state: State, entries: Entries, context: Context) -> State:
    """The decoded change is added to the whole global pair, of which a client of lower rank trains the leading part."""
    whole = stack([state.adapter, state.tail]).tensors()
    whole |= {name: whole[name] + to_dense(entry) for name, entry in entries.items()}
    return adopt_all(state, from_tensors(whole), state.frozen)


def adopt_all(state: State, adapter: LoraState, frozen: LoraState) -> State:
    """The leading components up to the own rank are trained, the others are kept beside them: nobody loses any."""
    ranks = state.adapter.ranks()
    beyond = {module: components(pair, ranks[module]) for module, pair in adapter.items() if pair.rank > ranks[module]}
    return replace(adopt_leading(state, adapter, frozen), tail=LoraState(beyond))
