"""FFA-LoRA: A stays at its seeded start, only B is trained and averaged (Sun et al., ICLR 2024, arXiv 2403.12313).

With A shared, the average of the products is the product with the average: exact.
"""

from __future__ import annotations

from functools import partial

from fedloom.methods.method import Facts, Method
from fedloom.methods.shared.averaging import average, only_b, replace_factors, send_factors


def ffa() -> Method:
    """A is drawn from the run's seed by everybody, so that it never travels."""
    return Method(
        name="ffa",
        facts=Facts(
            paper="FFA-LoRA (arXiv 2403.12313)",
            exact=True,
            sends="B, dense",
            receives="B, dense",
        ),
        compress=partial(send_factors, only_b),
        aggregate=average,
        receive=replace_factors,
        trainable=only_b,
    )
