"""Elements at positions that both sides draw alike, so that none travel: the linear face of a sparse method.

Which elements of a tensor are sent follows from the state that an update rests on (its digest) and the tensor's name.
So the positions of all clients of one version are the same, and what they send adds up element by element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fedloom.compress.budget import Room, fill_budget, value_bits
from fedloom.compress.entries import Seeded
from fedloom.compress.masks import STEPS, seeded_mask
from fedloom.compress.quantize import quantize
from fedloom.compress.seeds import derived_seed
from fedloom.compress.sparsify import Quantize
from fedloom.lora.pair import LoraState
from fedloom.methods.method import Context, Entries, State
from fedloom.methods.shared.dial import Dial

_FEW = 4  # elements of a tensor
_HEADER = 100  # bytes that no payload is without: header, index and checksum


def drawn_seed(digest: str, name: str) -> int:
    """The seed of the positions of tensor `name` ("module/A") in an update that rests on the state of this digest."""
    return derived_seed(0, "drawn", digest, name)


def drawn_share(dial: Dial, adapter: LoraState, context: Context) -> float:
    """The largest share of every tensor that a client sends, as both sides know it: what fits beside a header.

    In a secure sum a value takes as many bits as that has for one, whatever its form was.
    """
    room = max(dial.bytes(adapter, "up", context) - _HEADER, 0)
    bits = context.summed_bits or value_bits(context.quantize)
    return math.floor(min(dial.most, 8 * room / (bits * max(adapter.numel(), 1))) * STEPS) / STEPS


def drawn_places(dial: Dial, state: State, context: Context) -> dict[str, Tensor]:
    """Tensor → the flat places at which a client may send anything: a `Method.support`."""
    share = drawn_share(dial, state.adapter, context)
    return {
        name: seeded_mask(tensor.numel(), share, drawn_seed(state.digest, name)).nonzero().flatten()
        for name, tensor in state.adapter.tensors().items()
    }


def send_at_drawn(
    dial: Dial, step: float, state: State, after: LoraState, context: Context
) -> tuple[Mapping[str, Tensor], Entries]:
    """The same share of every tensor's change, as large as the budget has room for.

    What is sent has the L1 norm of the whole change, but at most `step` times its L2 norm. For a secure sum it is all
    that there is room for, in fp32: the sum rounds it to its own bits, and nothing else of it travels.
    """
    before, most = state.adapter.tensors(), drawn_share(dial, state.adapter, context)
    changes = {name: now - before[name] for name, now in after.tensors().items()}

    budget, elements = dial.bytes(state.adapter, "up", context), after.numel()
    form = quantize("fp32") if context.summed_bits else context.quantize

    def entries_at(density: float) -> dict[str, Seeded]:
        share = math.floor(density * STEPS) / STEPS
        return {
            name: _entry(name, change, step, share, state.digest, context, form) for name, change in changes.items()
        }

    if context.summed_bits:
        return state.memory, entries_at(most)

    # With so many, nearly every tensor has a scale: the solver counts what tensors cost by its smallest payload.
    few = min(most, _FEW * len(changes) / max(elements, 1))
    room = Room(budget, elements, len(changes), value_bits(context.quantize), most, positions=False)
    done = fill_budget(room, lambda density: entries_at(max(density, few)), context.size, state.memory)
    entries, size = done.entries, done.size
    while size > budget and few > 1 / STEPS:
        few /= 2
        entries = entries_at(few)
        size = context.size(entries)
    return done.memory, entries


def _entry(
    name: str, change: Tensor, step: float, share: float, digest: str, context: Context, form: Quantize
) -> Seeded:
    """So large a share of a change. Its values have the mean magnitude that `send_at_drawn` says."""
    seed, flat = drawn_seed(digest, name), change.flatten()
    kept = flat[seeded_mask(flat.numel(), share, seed)]
    number, mean = kept.numel(), float(kept.abs().mean()) if kept.numel() else 0.0
    if mean:
        longest = step * float(flat.norm()) / math.sqrt(number)
        kept = kept * (min(float(flat.abs().sum()) / number, longest) / mean)
    rounding = derived_seed(context.seed, "loom", context.round, name)
    return Seeded(tuple(change.shape), seed, share, form(kept, rounding))
