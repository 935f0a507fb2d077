"""The loop over scores, compiled by numba: see `sparsify`, whose numpy gives the same elements.

It is compiled at its first call and cached beside this file or, where that cannot be written, in the user's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[misc, unused-ignore]
def list_reaching(scores: Array, limit: float, positions: Array, reached: Array) -> None:
    """The positions and values of the scores of at least `limit`, in order; one place more than there are of them."""
    n = 0
    for k in range(scores.size):  # without a branch: every score is written, and the next one over it if it is too low
        positions[n] = k
        reached[n] = scores[k]
        n += scores[k] >= limit
