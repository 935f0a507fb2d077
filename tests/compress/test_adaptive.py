"""The adaptive coder: what was coded is told again, whatever stands behind it, in about as many bits as it is worth."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.compress.adaptive import Decoder, Encoder, code_number, code_signed

NUMBERS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(-255, 255)), max_size=60)


@given(NUMBERS, st.binary(max_size=9))
def test_numbers_are_told_as_they_were_coded_whatever_follows(numbers, rest):
    encoder = Encoder()
    for context, number, signed in numbers:
        assert code_number(encoder, context, number, 6) == number
        assert code_signed(encoder, context, signed, 8) == signed
    data = encoder.finish()
    decoder = Decoder(data + rest)
    for context, number, signed in numbers:
        assert (code_number(decoder, context, 0, 6), code_signed(decoder, context, 0, 8)) == (number, signed)
    assert decoder.finish() == data


@given(st.binary(max_size=40))
def test_any_bytes_tell_numbers_and_only_those_that_were_coded_so_are_accepted(data):
    decoder = Decoder(data)
    told = [code_signed(decoder, "it", 0, 8) for _ in range(20)]
    assert all(-255 <= number <= 255 for number in told)
    encoder = Encoder()
    for number in told:
        code_signed(encoder, "it", number, 8)
    made = encoder.finish()
    assert decoder.finish() == (made if data.startswith(made) else None)


@pytest.mark.parametrize("ones", [0, 3, 50, 200])
def test_decisions_take_no_more_than_the_estimator_promises(ones):
    """Krichevsky and Trofimov: at most ½ log₂ n + 1 bits above the entropy of how often each occurs; here in bytes."""
    encoder, count = Encoder(), 400
    for place in range(count):
        encoder.decide("same", int(place * ones % count < ones))
    share = ones / count
    entropy = count * sum(-p * math.log2(p) for p in (share, 1 - share) if p)
    assert 8 * len(encoder.finish()) <= entropy + 0.5 * math.log2(count) + 1 + 16


def test_a_decision_that_always_came_out_alike_may_come_out_otherwise():
    encoder, decisions = Encoder(), [0] * 70_000 + [1] + [0] * 3
    for bit in decisions:
        encoder.decide("same", bit)
    decoder = Decoder(encoder.finish())
    assert [decoder.decide("same") for _ in decisions] == decisions
