"""FedEx-LoRA: FedAvg of the factors, and its error sent along to be merged.

(Singhal et al., ACL 2025, arXiv 2410.09432)
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from fedloom.lora.pair import LoraState
from fedloom.methods.method import FROZEN, Aggregate, Context, Facts, Method, State, Update, both_factors
from fedloom.methods.shared.averaging import average, dense_entries, product_sums, send_factors
from fedloom.methods.shared.components import go_on, read_pairs


def fedex() -> Method:
    """The residual ΔW* − B̄ Ā travels as factors of rank (K − 1) r at most, never as a dense matrix."""
    return Method(
        name="fedex",
        facts=Facts(
            paper="FedEx-LoRA (arXiv 2410.09432)",
            exact=True,
            receives="A, B and the residual's factors",
            keeps="merged increments",
            broadcasts="components",
            stateless=True,
        ),
        compress=partial(send_factors, both_factors),
        aggregate=mean_and_residual,
        receive=go_on,
        merges=True,
    )


def mean_and_residual(state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Ā, B̄, and the factors of Σ p_k B_k A_k − B̄ Ā, with B̄ and Ā as they will be received."""
    mean = average(state, updates, context).entries
    means = read_pairs(mean)
    sums = product_sums(updates, means)
    for module, pair in means.items():
        sums[module].add(pair, -1.0)
    residual = LoraState({module: total.truncate().pair for module, total in sums.items()})
    stats = {"mean_residual_rank": sum(residual.ranks().values()) / max(len(residual), 1)}
    return Aggregate({**mean, **dense_entries(residual, context, FROZEN)}, {}, stats)
