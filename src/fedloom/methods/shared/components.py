"""What the methods share that broadcast components of an aggregate: how a participant takes them up.

Entries "module/A" and "module/B" are the adapter to go on with, leading components first; "module/frozen_A" and
"module/frozen_B" are increments that everybody merges. A module that a broadcast does not name stays as it is.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedloom.compress.entries import to_dense
from fedloom.compress.seeds import derived_seed
from fedloom.lora.lowrank import truncate
from fedloom.lora.pair import LoraPair, LoraState, from_tensors, initial_state, stack
from fedloom.methods.method import FROZEN, Context, Entries, State, adopt_leading


def components(pair: LoraPair, first: int, last: int | None = None) -> LoraPair:
    """Components first … last − 1 of a pair (none where it has no more)."""
    return LoraPair(pair.A[first:last], pair.B[:, first:last])


def components_beyond(adapter: LoraState, module: str, rank: int) -> LoraPair:
    """The server's components that a client of this rank does not train: its `tail`, which counts as its own."""
    return components(adapter[module], rank)


def restart(state: State, entries: Entries, context: Context) -> State:
    """Merge what was broadcast, and begin a fresh adapter, the same seeded one for all."""
    merged, start = read_pairs(entries, FROZEN), draw_fresh(state, context)
    adapter = LoraState({module: start[module] if module in merged else pair for module, pair in state.adapter.items()})
    return replace(state, adapter=adapter, frozen=merge_increment(state.frozen, merged))


def go_on(state: State, entries: Entries, context: Context) -> State:
    """Go on from the leading components up to the own rank, drop the others, and merge any increments."""
    lead, start = read_pairs(entries), draw_fresh(state, context)
    taken = {module: fill_rank(pair, start[module]) for module, pair in lead.items()}
    return replace(
        state,
        adapter=LoraState({**state.adapter, **taken}),
        frozen=merge_increment(state.frozen, read_pairs(entries, FROZEN)),
    )


def go_on_warm(state: State, entries: Entries, context: Context) -> State:
    """`go_on`, with the components beyond the own rank kept in use as the tail."""
    return with_tail(go_on(state, entries, context), read_pairs(entries))


def adopt_warm(state: State, adapter: LoraState, frozen: LoraState) -> State:
    """A full state for `go_on_warm`."""
    return with_tail(adopt_leading(state, adapter, frozen), adapter)


def with_tail(state: State, adapter: LoraState) -> State:
    """The state with what lies in `adapter` beyond the own rank as its tail.

    Components that add nothing are left out, so that a full state, whose adapter was filled up, gives the same bits.
    """
    ranks = state.adapter.ranks()
    beyond = {module: used_components(components(pair, ranks[module])) for module, pair in adapter.items()}
    return replace(state, tail=LoraState({**state.tail, **beyond}))


def used_components(pair: LoraPair) -> LoraPair:
    """The components whose column of B is not zero."""
    used = pair.B.any(dim=0)
    return LoraPair(pair.A[used], pair.B[:, used])


def read_pairs(entries: Entries, prefix: str = "") -> LoraState:
    """The pairs among the entries."""
    return from_tensors({name: to_dense(entry) for name, entry in entries.items()}, prefix)


def draw_fresh(state: State, context: Context) -> LoraState:
    """A start like the first one (B = 0), of the participant's own ranks, drawn from the seed and the round."""
    seed = derived_seed(context.seed, "fresh", context.round)
    return initial_state(state.adapter.shapes(), state.adapter.ranks(), seed)


def fill_rank(pair: LoraPair, start: LoraPair) -> LoraPair:
    """The pair cut or filled to the rank of `start`. New components get its A and a B of zeros: they can train."""
    missing = max(start.rank - pair.rank, 0)
    a = torch.cat([pair.A[: start.rank], start.A[start.rank - missing :]])
    return LoraPair(a, torch.nn.functional.pad(pair.B[:, : start.rank], (0, missing)))


def merge_increment(frozen: LoraState, increment: LoraState) -> LoraState:
    """The merged increments with one more. Above rank min(m, n) they are truncated to it: only rounding is lost."""
    return stack([frozen, increment]).map(lambda pair: truncate(pair).pair if pair.rank > min(pair.shape) else pair)
