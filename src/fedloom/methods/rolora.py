"""RoLoRA: B and A trained and averaged in turn (Chen et al., NeurIPS 2025, arXiv 2502.01755).

The factor that rests is the same everywhere, so every round is exact, for unequal ranks as well: a client of rank q
trains the first q columns of B or rows of A and uses the others as they are (`shared.whole`).
"""

from __future__ import annotations

from functools import partial

from fedloom.lora.pair import PARTS
from fedloom.methods.method import Facts, Method
from fedloom.methods.shared.averaging import alternating_factors, send_factors
from fedloom.methods.shared.whole import adopt_whole, average_whole, read_whole, take_whole


def rolora() -> Method:
    """B in odd rounds, A in even ones."""
    return Method(
        name="rolora",
        facts=Facts(
            paper="RoLoRA (arXiv 2502.01755)",
            exact=True,
            unequal_ranks=True,
            sends="B or A in turn, dense",
            receives="the same factor, dense",
        ),
        compress=partial(send_factors, alternating_factors),
        aggregate=average_whole,
        receive=take_whole,
        replaces=PARTS,
        adopt=adopt_whole,
        adds=read_whole,
        trainable=alternating_factors,
    )
