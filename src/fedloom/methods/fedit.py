"""FedIT: FedAvg of the factors, dense both ways (Zhang et al., ICASSP 2024, arXiv 2305.05644).

The product of the averages is not the average of the products: the error is Σ p_k (B_k − B̄)(A_k − Ā).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedloom.lora import LoraState, derived_seed, from_tensors
from fedloom.method import Aggregate, Context, Entries, Facts, Method, State, Update
from fedloom.tensors import Dense, Entry, dense, to_dense


def fedit() -> Method:
    """FedAvg on A and B apart. Clients of lower rank are padded: B with zeros, A with the rows they do not hold."""
    return Method(
        name="fedit",
        facts=Facts(
            paper="FedIT (arXiv 2305.05644)",
            exact=False,
            unequal_ranks=True,
            sends="A and B, dense",
            receives="A and B, dense",
            keeps="nothing",
        ),
        compress=send_factors,
        aggregate=average,
        receive=replace_factors,
        narrow=narrow_factors,
    )


def send_factors(state: State, after: LoraState, context: Context) -> tuple[Mapping[str, Tensor], Entries]:
    """All of A and B as they are after training."""
    return state.memory, dense_entries(after, context)


def dense_entries(adapter: LoraState, context: Context, prefix: str = "") -> dict[str, Entry]:
    """Both factors of every module, with values coded as the run says."""
    return {
        name: Dense(
            tuple(tensor.shape),
            context.quantize(tensor.reshape(-1), derived_seed(context.seed, "dense", context.round, name)),
        )
        for name, tensor in adapter.tensors(prefix).items()
    }


def average(state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Ā = Σ p_k A_k and B̄ = Σ p_k B_k, at the rank of the server's adapter."""
    means = {name: torch.zeros_like(tensor) for name, tensor in state.adapter.tensors().items()}
    for update in updates:
        for name, tensor in padded(update, state.adapter).items():
            means[name].add_(tensor, alpha=update.weight)
    return Aggregate(dense_entries(from_tensors(means), context))


def padded(update: Update, adapter: LoraState) -> dict[str, Tensor]:
    """A client's factors at the server's rank: the same ΔW, and rows of A that can still be trained."""
    tensors = {name: to_dense(entry) for name, entry in update.entries.items()}
    for module, pair in adapter.items():
        a, b = tensors[f"{module}/A"], tensors[f"{module}/B"]
        if a.shape[0] < pair.rank:
            tensors[f"{module}/A"] = torch.cat([a, pair.A[a.shape[0] :]])
            tensors[f"{module}/B"] = torch.nn.functional.pad(b, (0, pair.rank - b.shape[1]))
    return tensors


def replace_factors(state: State, entries: Entries, context: Context) -> State:
    """The broadcast factors take the place of the old ones."""
    received = from_tensors({name: to_dense(entry) for name, entry in entries.items()})
    return replace(state, adapter=received)


def narrow_factors(entries: Entries, ranks: Mapping[str, int]) -> Entries:
    """The first `ranks[module]` rows of A and columns of B, coded anew as float32."""
    cut: dict[str, Entry] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition("/")
        rank = ranks[module]
        tensor = to_dense(entry)
        keep = tensor[:rank] if part == "A" else tensor[:, :rank]
        cut[name] = entry if keep.shape == tensor.shape else dense(keep)
    return cut
