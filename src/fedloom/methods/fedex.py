"""FedEx-LoRA: FedAvg of the factors, and its error sent along to be merged.

(Singhal et al., ACL 2025, arXiv 2410.09432)

What the averages miss is sent, however they are taken. For unequal ranks they are those of whole factors
(`shared.whole`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from fedloom.lora.pair import PARTS, LoraState
from fedloom.methods.method import FROZEN, Aggregate, Context, Entries, Facts, Method, State, Update, both_factors
from fedloom.methods.shared.averaging import dense_entries, product_sums, send_factors
from fedloom.methods.shared.components import components_beyond, merge_increment, read_pairs
from fedloom.methods.shared.whole import adopt_whole, average_whole, take_whole


def fedex() -> Method:
    """The residual ΔW* − B̄ Ā travels as factors of rank (K − 1) r at most, never as a dense matrix."""
    return Method(
        name="fedex",
        facts=Facts(
            paper="FedEx-LoRA (arXiv 2410.09432)",
            exact=True,
            unequal_ranks=True,
            receives="A, B and the residual's factors",
            keeps="merged increments",
            broadcasts="components",
            stateless=True,
        ),
        updates="factors",
        compress=partial(send_factors, both_factors),
        aggregate=mean_and_residual,
        receive=take_up,
        adopt=adopt_whole,
        merges=True,
    )


def mean_and_residual(state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Ā, B̄, and the factors of Σ p_k B_k A_k − B̄ Ā, with B̄ and Ā as they will be received."""
    mean = average_whole(state, updates, context).entries
    means = read_pairs(mean)
    sums = product_sums(updates, means, beside=partial(components_beyond, state.adapter))
    for module, pair in means.items():
        sums[module].add(pair, -1.0)
    residual = LoraState({module: total.truncate().pair for module, total in sums.items()})
    stats = {"mean_residual_rank": sum(residual.ranks().values()) / max(len(residual), 1)}
    return Aggregate({**mean, **dense_entries(residual, context, FROZEN)}, {}, stats)


def take_up(state: State, entries: Entries, context: Context) -> State:
    """Go on from the means, and merge the residual."""
    means = {name: entry for name, entry in entries.items() if name.rpartition("/")[2] in PARTS}
    frozen = merge_increment(state.frozen, read_pairs(entries, FROZEN))
    return replace(take_whole(state, means, context), frozen=frozen)
