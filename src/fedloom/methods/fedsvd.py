"""FedSVD: B is trained and averaged, then both factors are turned so that the rows of A are orthonormal.

(Lee et al., NeurIPS 2025, arXiv 2505.12805)

The turn sorts the components by size, so that a client of lower rank trains the leading ones. It uses the others as
they are (`shared.whole`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from fedloom.lora.lowrank import truncate
from fedloom.lora.pair import PARTS, LoraState
from fedloom.methods.method import Aggregate, Context, Facts, Method, State, Update
from fedloom.methods.shared.averaging import dense_entries, only_b, send_factors
from fedloom.methods.shared.components import fill_rank
from fedloom.methods.shared.whole import adopt_whole, average_whole, read_whole, take_whole


def fedsvd() -> Method:
    """The product B A is unchanged by the turn: B̄ A = U Σ Vᵀ gives B = U Σ and A = Vᵀ."""
    return Method(
        name="fedsvd",
        facts=Facts(
            paper="FedSVD (arXiv 2505.12805)",
            exact=True,
            unequal_ranks=True,
            sends="B, dense",
        ),
        compress=partial(send_factors, only_b),
        aggregate=turn_product,
        receive=take_whole,
        replaces=PARTS,
        adopt=adopt_whole,
        adds=read_whole,
        trainable=only_b,
    )


def turn_product(state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """B̄ and A as they were where B̄ = 0 (there is nothing to turn), otherwise their product's singular factors.

    Directions that B̄ does not use keep rows of the old A, so that they can still train.
    """
    means = take_whole(state, average_whole(state, updates, context).entries, context).adapter
    turn = {module: fill_rank(truncate(pair).pair, pair) for module, pair in means.items()}
    return Aggregate(dense_entries(LoraState(turn), context))
