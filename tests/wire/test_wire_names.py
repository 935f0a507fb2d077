"""Names in the index begin with what they share with the name before."""

from hypothesis import given
from hypothesis import strategies as st

from fedloom.wire.index import _shared_prefix

NAMES = st.binary(max_size=12) | st.text("ab\x00", max_size=8).map(str.encode)


@given(NAMES, NAMES)
def test_the_shared_part_is_that_of_a_slow_twin(left: bytes, right: bytes) -> None:
    shared = 0
    while shared < min(len(left), len(right)) and left[shared] == right[shared]:
        shared += 1
    assert _shared_prefix(left, right) == shared
