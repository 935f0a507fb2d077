"""What the methods share in which everybody holds the server's whole adapter, whatever its own rank.

A client of rank q trains the first q components of the server's pair and uses the others as they are: they are its
`State.tail`. So all begin a round with the same model. What client k ends it with is W0 + B_k A_k, where B_k and A_k
begin with what it has trained and go on with what the server has.

Averages are taken over these whole factors. A component moves by the shares of those that train it, and what nobody
trains stays where it is. So Σ p_k B_k A_k is the mean of the models as they are, whatever the ranks, and a method that
is exact for equal ranks is exact for unequal ones. Zeros in the place of what a client does not hold (HetLoRA, arXiv
2401.06432) would shrink every component that some client lacks, in every round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from fedloom.compress.entries import Entry, Sparse, add_entry, count, dense_entry, to_dense
from fedloom.lora.pair import LoraState, from_tensors, stack
from fedloom.methods.method import Aggregate, Context, Entries, State, Update, adopt_leading
from fedloom.methods.shared.averaging import code_dense, weighted_mean
from fedloom.methods.shared.components import components


def adopt_whole(state: State, adapter: LoraState, frozen: LoraState) -> State:
    """Train the leading components up to the own rank and keep the others beside them, so that nobody loses any."""
    ranks = state.adapter.ranks()
    beyond = {module: components(pair, ranks[module]) for module, pair in adapter.items() if pair.rank > ranks[module]}
    return replace(adopt_leading(state, adapter, frozen), tail=LoraState(beyond))


def whole_adapter(state: State) -> LoraState:
    """The server's adapter as this participant holds it: what it trains, and its tail."""
    return stack([state.adapter, state.tail]) if state.tail else state.adapter


def whole_rank(state: State, module: str) -> int:
    """The rank of the server's adapter in this module."""
    beyond = state.tail[module].rank if module in state.tail else 0
    return state.adapter[module].rank + beyond


def take_whole(state: State, entries: Entries, context: Context) -> State:
    """Replace the factors of the whole adapter by the broadcast ones; a factor that was not sent stays."""
    received = {name: to_dense(entry) for name, entry in entries.items()}
    return adopt_whole(state, from_tensors(whole_adapter(state).tensors() | received), state.frozen)


def add_to_whole(state: State, entries: Entries, context: Context) -> State:
    """Add the decoded change to the whole adapter: the same single addition on the server and on every client."""
    whole = whole_adapter(state).tensors()
    whole |= {name: add_entry(whole[name], entry) for name, entry in entries.items()}
    return adopt_whole(state, from_tensors(whole), state.frozen)


def average_whole(state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Σ p_k of every whole factor that was sent."""
    means = weighted_mean(updates, read=lambda entries: read_whole(entries, state.adapter))
    return Aggregate({name: code_dense(name, tensor, context) for name, tensor in means.items()})


def read_whole(entries: Entries, adapter: LoraState) -> dict[str, Tensor]:
    """The factors as their client holds them: what it sent, then the components of the server's `adapter`."""
    whole = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition("/")
        sent, server = to_dense(entry), adapter[module].part(part)
        axis = 0 if part == "A" else 1
        rank = sent.shape[axis]
        beyond = server.narrow(axis, rank, server.shape[axis] - rank)
        whole[name] = torch.cat([sent, beyond], dim=axis) if beyond.numel() else sent
    return whole


def read_whole_change(entries: Entries, adapter: LoraState) -> dict[str, Tensor]:
    """A client's changes of the factors as changes of the whole ones: zero beyond its rank."""
    ranks = adapter.ranks()
    change = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition("/")
        change[name] = to_dense(widen_change(entry, part, ranks[module]))
    return change


def read_whole_pairs(entries: Entries, adapter: LoraState) -> LoraState:
    """`read_whole` for entries that hold both factors of their modules."""
    return from_tensors(read_whole(entries, adapter))


def widen_change(entry: Entry, part: str, rank: int) -> Entry:
    """A client's change of a factor, "A" (q × n) or "B" (m × q), as a change of the whole one of `rank`: zero beyond q.

    Sparse changes stay sparse.
    """
    rows, columns = entry.shape
    shape = (rank, columns) if part == "A" else (rows, rank)
    if shape == entry.shape:
        return entry
    if not isinstance(entry, Sparse):
        whole = torch.zeros(count(shape)).view(shape)
        whole[:rows, :columns] = to_dense(entry)
        return dense_entry(whole)
    # Rows keep their length in A; in B every one of them begins later.
    positions = entry.positions if part == "A" else entry.positions // columns * rank + entry.positions % columns
    return Sparse(shape, positions, entry.values)
