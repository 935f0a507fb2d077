"""FLoRA: everybody's factors, stacked, are merged by everybody (Wang et al., NeurIPS 2024, arXiv 2409.05976).

Exact at any ranks; the download grows with the sum of the ranks, and every round begins from a fresh adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from fedloom.lora.pair import LoraPair, LoraState, stack
from fedloom.methods.method import FROZEN, Aggregate, Context, Facts, Method, State, Update, both_factors
from fedloom.methods.shared.averaging import dense_entries, send_factors
from fedloom.methods.shared.components import read_pairs, restart


def flora() -> Method:
    """The shares p_k scale A alone, so that the stack's product is Σ p_k B_k A_k and nothing is attenuated twice."""
    return Method(
        name="flora",
        facts=Facts(
            paper="FLoRA (arXiv 2409.05976)",
            exact=True,
            unequal_ranks=True,
            receives="the stack of all A and B",
            keeps="merged increments",
            broadcasts="components",
            stateless=True,
        ),
        compress=partial(send_factors, both_factors),
        aggregate=stack_clients,
        receive=restart,
        merges=True,
    )


def stack_clients(state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """[B_1 | B_2 | …] and [p_1 A_1; p_2 A_2; …]."""
    whole = stack([scale_state(read_pairs(update.entries), update.weight) for update in updates])
    return Aggregate(dense_entries(whole, context, FROZEN), {}, {"mean_rank": mean_rank(whole)})


def scale_state(state: LoraState, weight: float) -> LoraState:
    """The state whose ΔW is `weight` times as large."""
    return state.map(lambda pair: LoraPair(weight * pair.A, pair.B))


def mean_rank(state: LoraState) -> float:
    """Mean rank over modules."""
    return sum(state.ranks().values()) / max(len(state), 1)
