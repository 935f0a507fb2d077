"""What the averaging methods share: dense factors up, their weighted mean down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedloom.lora import LoraState, derived_seed, from_tensors
from fedloom.method import Aggregate, Context, Entries, State, Update
from fedloom.tensors import Dense, Entry, dense, to_dense

Parts = Callable[[int], tuple[str, ...]]
"""Round → the factors that are trained and sent in it."""


def only_b(round: int) -> tuple[str, ...]:
    """B alone, in every round."""
    return ("B",)


def alternating(round: int) -> tuple[str, ...]:
    """B in odd rounds, A in even ones: at the start B = 0, and a change of A would change nothing."""
    return ("B",) if round % 2 else ("A",)


def coded(name: str, tensor: Tensor, context: Context) -> Dense:
    """A whole tensor, its values coded as the run says."""
    seed = derived_seed(context.seed, "dense", context.round, name)
    return Dense(tuple(tensor.shape), context.quantize(tensor.reshape(-1), seed))


def dense_entries(adapter: LoraState, context: Context, prefix: str = "") -> dict[str, Entry]:
    """Both factors of every module."""
    return {name: coded(name, tensor, context) for name, tensor in adapter.tensors(prefix).items()}


def send(parts: Parts, state: State, after: LoraState, context: Context) -> tuple[Mapping[str, Tensor], Entries]:
    """The trained factors as they are after training, dense."""
    sent = parts(context.round)
    return state.memory, {
        f"{module}/{part}": coded(f"{module}/{part}", pair.part(part), context)
        for module, pair in after.items()
        for part in sent
    }


def average(state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Σ p_k of every factor that was sent, at the rank of the server's adapter."""
    means: dict[str, Tensor] = {}
    for update in updates:
        for name, tensor in padded(update.entries, state.adapter).items():
            if name not in means:
                means[name] = torch.zeros_like(tensor)
            means[name].add_(tensor, alpha=update.weight)
    return Aggregate({name: coded(name, tensor, context) for name, tensor in means.items()})


def padded(entries: Entries, adapter: LoraState) -> dict[str, Tensor]:
    """Factors at the server's rank, with the same product: zero columns for B, and for A the rows the server has.

    Rows of zeros in A would never train, since B's gradient through them vanishes.
    """
    tensors = {name: to_dense(entry) for name, entry in entries.items()}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition("/")
        pair = adapter[module]
        if part == "A" and tensor.shape[0] < pair.rank:
            tensors[name] = torch.cat([tensor, pair.A[tensor.shape[0] :]])
        elif part == "B" and tensor.shape[1] < pair.rank:
            tensors[name] = torch.nn.functional.pad(tensor, (0, pair.rank - tensor.shape[1]))
    return tensors


def replace_factors(state: State, entries: Entries, context: Context) -> State:
    """The broadcast factors take the place of the old ones; a factor that was not sent stays."""
    received = {name: to_dense(entry) for name, entry in entries.items()}
    return replace(state, adapter=from_tensors(state.adapter.tensors() | received))


def add_change(state: State, entries: Entries, context: Context) -> State:
    """The old factors plus the decoded change: the same single addition on the server and on every client."""
    tensors = state.adapter.tensors()
    for name, entry in entries.items():
        tensors[name] = tensors[name] + to_dense(entry)
    return replace(state, adapter=from_tensors(tensors))


def narrow_factors(entries: Entries, ranks: Mapping[str, int]) -> Entries:
    """The first `ranks[module]` rows of A and columns of B; entries that need no cut stay as they are.

    A module that `ranks` does not name is kept whole.
    """
    cut: dict[str, Entry] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition("/")
        tensor = to_dense(entry)
        rank = ranks.get(module)
        keep = tensor[:rank] if part.endswith("A") else tensor[:, :rank]
        cut[name] = entry if keep.shape == tensor.shape else dense(keep)
    return entries if all(cut[name] is entry for name, entry in entries.items()) else cut
