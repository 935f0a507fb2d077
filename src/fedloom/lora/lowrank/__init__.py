"""Algebra of Σ w_k B_k A_k in factored form: sums, truncation, projection on one factor, norms.

    truncation.py   leading singular components of a product, with the energy that they leave out
    product_sum.py  a weighted sum of products that is built up one client at a time
    change.py       FedSRD's server step: the aggregate as a change of one factor
    norms.py        Frobenius norms, inner products and errors of products, in float64
    parallel.py     modules side by side, one BLAS thread each

Beneath them lie stack.py (a sum as its terms), gram.py, leading.py and kernels.py (how components are found),
inverse.py (the pseudo-inverse of a tall factor), sparse.py and compiled.py (products with sparse changes).

No function here forms an m × n matrix while the stacked rank is below min(m, n).
"""

from fedloom.lora.lowrank.change import FactorChange, ProductChange
from fedloom.lora.lowrank.norms import frobenius_norm, inner_product, relative_error
from fedloom.lora.lowrank.parallel import map_modules
from fedloom.lora.lowrank.product_sum import ProductSum, streaming_cap
from fedloom.lora.lowrank.truncation import Truncation, truncate, truncate_all, truncation_cost

__all__ = [
    "FactorChange",
    "ProductChange",
    "ProductSum",
    "Truncation",
    "frobenius_norm",
    "inner_product",
    "map_modules",
    "relative_error",
    "streaming_cap",
    "truncate",
    "truncate_all",
    "truncation_cost",
]
