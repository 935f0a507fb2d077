"""What methods share whose clients send scalars: steps along directions that server and clients draw alike.

The number of a direction is its place in a vector s, and the model is θ_0 + Σ_rounds Σ_j s_j z_j. A module's entry
"module/S" is s; as it is the same for all modules, a payload has it once (`rounds.joint`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedloom.compress.entries import Dense, Entry, Sparse, to_dense
from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError
from fedloom.lora.curvature import blend_curvature, scales_of
from fedloom.lora.directions import move_along_all
from fedloom.lora.pair import LoraState
from fedloom.methods.forward import ForwardOnly
from fedloom.methods.method import SCALARS, Aggregate, Context, Entries, Facts, Method, State, Update


def method_of_scalars(name: str, paper: str, forward: ForwardOnly) -> Method:
    """The method whose clients train by `forward`; both ways one number a direction that was tried."""
    tried = "seeds and scalars" if not forward.shared else "scalars"
    keeps = "everyone: the curvature of every element" if forward.curvature else "nothing"

    def compress(state: State, after: LoraState, context: Context) -> tuple[Mapping[str, Tensor], Entries]:
        return send_scalars(forward, name, state, after, context)

    def aggregate(state: State, updates: Iterable[Update], context: Context) -> Aggregate:
        return mean_scalars(forward, state, updates, context)

    def receive(state: State, entries: Entries, context: Context) -> State:
        return go_along(forward, state, entries, context)

    return Method(
        name=name,
        facts=Facts(paper=paper, sends=tried, receives=tried, keeps=keeps, broadcasts="scalars"),
        compress=compress,
        aggregate=aggregate,
        receive=receive,
        forward=forward,
        module_subsets=False,
        joins=True,
        values="bf16",
    )


def send_scalars(
    forward: ForwardOnly, method: str, state: State, after: LoraState, context: Context
) -> tuple[Mapping[str, Tensor], Entries]:
    """How far the client's training went along each direction. Raises ConfigError for a training of another kind."""
    now = after.tensors()
    if not context.moved.numel() and any(not torch.equal(now[n], t) for n, t in state.adapter.tensors().items()):
        raise ConfigError(
            f"method {method!r} trains by forward passes along directions of its own, and a client's training step has "
            "changed the adapter by other means: a trainer of one's own does not go with it; use another method"
        )
    entry = scalars_entry(forward, context.moved, context)
    return state.memory, {f"{module}/{SCALARS}": entry for module in after}


def scalars_entry(forward: ForwardOnly, moved: Tensor, context: Context) -> Entry:
    """The vector s, its values coded as the run says: up to its last number, or those at their places."""
    seed = derived_seed(context.seed, "scalars", context.round)
    places = moved.nonzero().flatten()
    if forward.shared:
        used = moved[: int(places[-1]) + 1 if places.numel() else 0]
        return Dense((used.numel(),), context.quantize(used, seed))
    return Sparse((forward.seeds,), places, context.quantize(moved[places], seed))


def mean_scalars(forward: ForwardOnly, state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Σ p_k s_k."""
    total = torch.zeros(forward.seeds)
    for update in updates:
        sent = to_dense(next(iter(update.entries.values())))
        total[: sent.numel()].add_(sent, alpha=update.weight)
    entry = scalars_entry(forward, total, context)
    return Aggregate({f"{module}/{SCALARS}": entry for module in state.adapter})


def go_along(forward: ForwardOnly, state: State, entries: Entries, context: Context) -> State:
    """θ + Σ s_j z_j; and what that change tells of the curvature, where directions are scaled by it."""
    scalars = to_dense(next(iter(entries.values())))
    steps = {
        forward.seed(context.seed, context.round, number): float(scalars[number])
        for number in scalars.nonzero().flatten().tolist()
    }
    moved = move_along_all(state.adapter, steps, scales_of(state.curvature))
    curvature = state.curvature
    if forward.curvature:
        curvature = blend_curvature(curvature, state.adapter, moved, forward.curvature)
    return replace(state, adapter=moved, curvature=curvature)
