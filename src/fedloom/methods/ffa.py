"""FFA-LoRA: A stays at its seeded start, only B is trained and averaged (Sun et al., ICLR 2024, arXiv 2403.12313).

With A shared, the average of the products is the product with the average: exact. That holds for unequal ranks as
well: a client of rank q trains the first q columns of B and uses the others as they are (`shared.whole`).
"""

from __future__ import annotations

from functools import partial

from fedloom.methods.method import Facts, Method
from fedloom.methods.shared.averaging import only_b, send_factors
from fedloom.methods.shared.whole import adopt_whole, average_whole, read_whole, take_whole


def ffa() -> Method:
    """A is drawn from the run's seed by everybody, so that it never travels."""
    return Method(
        name="ffa",
        facts=Facts(
            paper="FFA-LoRA (arXiv 2403.12313)",
            exact=True,
            unequal_ranks=True,
            sends="B, dense",
            receives="B, dense",
        ),
        updates="factors",
        compress=partial(send_factors, only_b),
        aggregate=average_whole,
        receive=take_whole,
        replaces=("B",),
        adopt=adopt_whole,
        adds=read_whole,
        trainable=only_b,
    )
