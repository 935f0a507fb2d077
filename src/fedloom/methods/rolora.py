"""RoLoRA: B and A trained and averaged in turn (Chen et al., NeurIPS 2025, arXiv 2502.01755).

The factor that rests is the same everywhere, so every round is exact.
"""

from __future__ import annotations

from functools import partial

from fedloom.methods.method import Facts, Method
from fedloom.methods.shared.averaging import alternating_factors, average, replace_factors, send_factors


def rolora() -> Method:
    """B in odd rounds, A in even ones."""
    return Method(
        name="rolora",
        facts=Facts(
            paper="RoLoRA (arXiv 2502.01755)",
            exact=True,
            sends="B or A in turn, dense",
            receives="the same factor, dense",
        ),
        compress=partial(send_factors, alternating_factors),
        aggregate=average,
        receive=replace_factors,
        trainable=alternating_factors,
    )
