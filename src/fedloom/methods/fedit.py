"""FedIT: FedAvg of the factors, dense both ways (Zhang et al., ICASSP 2024, arXiv 2305.05644).

The product of the averages is not the average of the products: the error is Σ p_k (B_k − B̄)(A_k − Ā).
"""

from __future__ import annotations

from functools import partial

from fedloom.lora.pair import PARTS
from fedloom.methods.method import Facts, Method, both_factors
from fedloom.methods.shared.averaging import average, narrow_factors, pad_factors, replace_factors, send_factors


def fedit() -> Method:
    """FedAvg on A and B apart. Clients of lower rank are padded: B with zeros, A with the rows they do not hold."""
    return Method(
        name="fedit",
        facts=Facts(
            paper="FedIT (arXiv 2305.05644)",
            unequal_ranks=True,
            own_part=True,
            stateless=True,
        ),
        updates="factors",
        compress=partial(send_factors, both_factors),
        aggregate=average,
        receive=replace_factors,
        replaces=PARTS,
        narrow=narrow_factors,
        adds=pad_factors,
        values="int8",
    )
