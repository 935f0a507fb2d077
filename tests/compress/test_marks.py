"""Elements of a tensor that are found again by a bit for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.compress.entries import floats, some_floats
from fedloom.compress.fast import torch_only
from fedloom.compress.marks import Marks
from fedloom.compress.quantize import VALUE_KINDS, quantize


@given(st.sets(st.integers(0, 99)), st.sets(st.integers(0, 99)))
def test_marks_find_what_two_sets_share_with_numba_and_without(own, other):
    pytest.importorskip("numba")
    import numba  # noqa: F401 - loaded, so that the loops are used at any size

    marked, asked = (np.array(sorted(some), dtype=np.int64) for some in (own, other))
    which, places = Marks.of(marked, 100).find(asked)
    with torch_only():
        slow = Marks.of(marked, 100)
        assert all(map(np.array_equal, slow.find(asked), (which, places)))
    assert asked[which].tolist() == sorted(own & other)
    assert marked[places].tolist() == sorted(own & other)


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_some_floats_are_those_of_all_of_them(kind):
    values = quantize(kind)(torch.randn(2500, generator=torch.Generator().manual_seed(0)), 0)
    which = torch.tensor([0, 3, 127, 128, 2499])
    assert torch.equal(some_floats(values, which), floats(values)[which])
