"""A step taken back in the bytes of its round: its largest elements at once, the rest with later broadcasts.

With loom's `taper` a round has fewer bytes than the one before, whose step it may have to take back (`shared.guard`).
"""

from __future__ import annotations

from torch import Tensor, zeros_like

from fedloom.compress.budget import Room, fill_budget, value_bits
from fedloom.compress.entries import Sparse
from fedloom.compress.seeds import derived_seed
from fedloom.compress.sparsify import kept_count, select_largest
from fedloom.methods.method import Aggregate, Context
from fedloom.methods.shared.averaging import add_weighted
from fedloom.methods.shared.few import keep_few
from fedloom.methods.shared.guard import UNDONE, Verdict, Witness


def take_back_within(witness: Witness, verdict: Verdict, budget: int, context: Context) -> Aggregate:
    """The last step with its sign turned, as far as a budget of bytes goes, as the round's broadcast.

    What has no place in it waits in the server's memory, under the tensor's name. As in loom's other broadcasts every
    tensor has an entry, so that few elements travel joined (`rounds.joint`).
    """
    state = witness.state
    most = sum(step.values.numel() for step in witness.steps.values()) / max(state.adapter.numel(), 1)

    def turned(density: float) -> dict[str, Sparse]:
        return {name: _turned(witness, name, density / most, context) for name in witness.steps}

    entries, left = turned(most), {}
    if context.size(entries) > budget:
        room = Room(budget, state.adapter.numel(), len(entries), value_bits(context.quantize), most)
        done = fill_budget(room, turned, context.size, state.memory)
        entries = dict(done.entries)
        if done.size > budget:
            worth = {name: max(step.values.abs().tolist(), default=0.0) for name, step in witness.steps.items()}
            entries = dict(keep_few(entries, worth, budget, context.size, context.quantize))
        left = {name: _still_to_turn(witness, name, entry) for name, entry in entries.items()}
    return Aggregate(entries, {**state.memory, **left, **witness.forget(verdict)}, {**verdict.stats, UNDONE: 1.0})


def _turned(witness: Witness, name: str, share: float, context: Context) -> Sparse:
    """A tensor's largest elements of the last step with their sign turned, at least one if there is any."""
    step, shape = witness.steps[name], tuple(witness.state.adapter.tensors()[name].shape)
    chosen = select_largest(step.values.abs(), kept_count(step.values.numel(), share))
    seed = derived_seed(context.seed, "guard", context.round, name)
    values = context.quantize(-step.values.index_select(0, chosen), seed)
    return Sparse(shape, step.positions.index_select(0, chosen), values)


def _still_to_turn(witness: Witness, name: str, sent: Sparse) -> Tensor:
    """What waits of a tensor, once `sent` has turned a part of the last step back."""
    step, memory = witness.steps[name], witness.state.memory
    waiting = memory[name].clone() if name in memory else zeros_like(witness.state.adapter.tensors()[name])
    waiting.view(-1)[step.positions] -= step.values
    add_weighted(waiting, sent, -1.0)
    return waiting
