"""What methods share that average: dense factors up, and the two sums over clients.

`weighted_mean` is Σ p_k T_k of every tensor that was sent, be it a factor, a change, or what a method makes of them.
`product_sums` is Σ p_k B_k A_k of every module, in factored form.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from fedloom.compress.budget import BudgetFill, Made, Room, fill_budget, value_bits
from fedloom.compress.entries import Dense, Entry, Sparse, dense_entry, entry_bytes, floats, to_dense
from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError
from fedloom.lora.lowrank import ProductSum, streaming_cap
from fedloom.lora.pair import PARTS, LoraPair, LoraState, from_tensors
from fedloom.methods.method import Aggregate, Context, Entries, State, Update

Parts = Callable[[int], tuple[str, ...]]
"""Round → the factors that are trained and sent in it."""


def only_b(round: int) -> tuple[str, ...]:
    """B alone, in every round."""
    return ("B",)


def alternating_factors(round: int) -> tuple[str, ...]:
    """B in odd rounds, A in even ones: at the start B = 0, and a change of A would change nothing."""
    return ("B",) if round % 2 else ("A",)


def code_dense(name: str, tensor: Tensor, context: Context) -> Dense:
    """A whole tensor, its values coded as the run says."""
    seed = derived_seed(context.seed, "dense", context.round, name)
    return Dense(tuple(tensor.shape), context.quantize(tensor.reshape(-1), seed))


def dense_entries(adapter: LoraState, context: Context, prefix: str = "") -> dict[str, Entry]:
    """Both factors of every module."""
    return {name: code_dense(name, tensor, context) for name, tensor in adapter.tensors(prefix).items()}


def send_factors(
    parts: Parts, state: State, after: LoraState, context: Context
) -> tuple[Mapping[str, Tensor], Entries]:
    """The trained factors as they are after training, dense."""
    sent = parts(context.round)
    return state.memory, {
        f"{module}/{part}": code_dense(f"{module}/{part}", pair.part(part), context)
        for module, pair in after.items()
        for part in sent
    }


def average(state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Σ p_k of every factor that was sent, at the rank of the server's adapter."""
    means = weighted_mean(updates, read=lambda entries: pad_factors(entries, state.adapter))
    return Aggregate({name: code_dense(name, tensor, context) for name, tensor in means.items()})


def read_as_sent(entries: Entries) -> Entries:
    """Every entry as it is."""
    return entries


def zero_change(adapter: LoraState, parts: Collection[str] = PARTS) -> dict[str, Tensor]:
    """Where a sum of changes of the factors, or of these parts of them, begins."""
    held = adapter.tensors()
    return {name: torch.zeros_like(tensor) for name, tensor in held.items() if name.rpartition("/")[2] in parts}


def client_share(update: Update, name: str) -> float:
    """The client's share p_k of the round, the same for all of its tensors."""
    return update.weight


def weighted_mean(
    updates: Iterable[Update],
    *,
    start: Mapping[str, Tensor] | None = None,
    read: Callable[[Entries], Mapping[str, Tensor | Entry]] = read_as_sent,
    weight: Callable[[Update, str], float] = client_share,
) -> dict[str, Tensor]:
    """Σ_k weight(update_k, name) · T_k of every name; one update is in memory at a time.

    read: entries of a module → the T_k to add; of a sparse one only its elements are. weight: p_k unless a method
    weighs otherwise. start: the tensors to add to, in place; zeros for a name that is not in it. A T_k may be smaller
    than the tensor of its name in `start`: it is added to the leading rows and columns.
    """
    sums = dict(start or {})
    for update in updates:
        for entries in by_module(update.entries):
            for name, tensor in read(entries).items():
                if name not in sums:
                    sums[name] = torch.zeros_like(tensor) if isinstance(tensor, Tensor) else torch.zeros(tensor.shape)
                add_weighted(sums[name], tensor, weight(update, name))
        del update  # the next one is read before the loop lets go of this one
    return sums


def add_weighted(total: Tensor, part: Tensor | Entry, weight: float) -> None:
    """Add weight · part to the leading rows and columns of `total`, in place: the same numbers for every form of it."""
    if isinstance(part, Sparse) and part.shape == tuple(total.shape) and total.is_contiguous():
        flat, where = total.view(-1), part.positions
        flat.index_copy_(0, where, flat.index_select(0, where).add_(floats(part.values), alpha=weight))
        return
    whole = part if isinstance(part, Tensor) else to_dense(part)
    total[tuple(slice(size) for size in whole.shape)].add_(whole, alpha=weight)


def by_module(entries: Entries) -> Iterator[Entries]:
    """The entries of one module after the other, in order of name: they may be decoded where they are asked for."""
    for _, names in groupby(sorted(entries), lambda name: name.rpartition("/")[0]):
        yield {name: entries[name] for name in names}


def product_sums(
    updates: Iterable[Update],
    adapter: LoraState,
    *,
    capped: bool = False,
    beside: Callable[[str, int], LoraPair] | None = None,
) -> dict[str, ProductSum]:
    """Module → Σ_k p_k B_k A_k in factored form, for every module of the server's `adapter`.

    capped: bound each sum's rank, so that a large cohort stays in memory; what that loses is reported by `truncate`.
    beside: (module, rank) → the pair that a client of this rank uses beside the one it sent; it has the same share.
    """
    caps = {module: streaming_cap(pair.rank) if capped else None for module, pair in adapter.items()}
    sums = {module: ProductSum(pair.shape, cap=caps[module]) for module, pair in adapter.items()}
    for update in updates:
        for module in sorted({name.rpartition("/")[0] for name in update.entries}):
            a, b = (update.entries[f"{module}/{part}"] for part in PARTS)
            # Codes take a quarter of the memory of what they stand for, or less.
            shape = b.shape[0], a.shape[1]
            size = entry_bytes(a) + entry_bytes(b)
            sums[module].add_later(partial(read_pair, a, b), shape, a.shape[0], size, update.weight)
            if beside is not None:
                sums[module].add(beside(module, a.shape[0]), update.weight)
    return sums


def read_pair(a: Entry, b: Entry) -> LoraPair:
    """The pair of two entries."""
    return LoraPair(to_dense(a), to_dense(b))


def fill_within_budget(
    state: State,
    tensors: int,
    entries_at: Callable[[float], Mapping[str, Made]],
    context: Context,
    *,
    positions: bool = True,
) -> BudgetFill[Made]:
    """The entries that fill `context.budget`, for a method whose density is one number (see `budget.fill_budget`).

    entries_at: density → the entries of so many `tensors`. Raises ConfigError where not even those of density 0 fit.
    """
    elements = state.adapter.numel()
    budget = int(context.budget.bytes(elements)) if context.budget else 0
    room = Room(budget, elements, tensors, value_bits(context.quantize), positions=positions)
    done = fill_budget(room, entries_at, context.size, state.memory)
    if done.size > budget:
        raise ConfigError(
            f"wire.budget allows {budget} bytes for a payload of a client, but one takes {done.size} at "
            f"the least, since it has {tensors} tensors: set {done.size} or more, or adapt fewer modules"
        )
    return done


def pad_factors(entries: Entries, adapter: LoraState) -> dict[str, Tensor]:
    """Factors padded to the server's rank without a change of their product.

    B is padded with columns of zeros, A with the server's own rows: a row of zeros in A would never train, since the
    gradient of its column of B vanishes.
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
    """Replace the old factors by the broadcast ones; a factor that was not sent stays."""
    received = {name: to_dense(entry) for name, entry in entries.items()}
    return replace(state, adapter=from_tensors(state.adapter.tensors() | received))


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
        cut[name] = entry if keep.shape == tensor.shape else dense_entry(keep)
    return entries if all(cut[name] is entry for name, entry in entries.items()) else cut
