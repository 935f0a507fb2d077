"""A `Method` value is told from another of its name by what is bound in its functions."""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from fedloom.methods.fingerprint import fingerprint
from fedloom.methods.method import replace
from fedloom.methods.table import METHODS, build


def with_compress(compress):
    return replace(build("fedit"), compress=compress)


def closing_over(value):
    def compress(state, after, context):
        return value

    return with_compress(compress)


def first(state, after, context, *, keep=1):
    return keep


def second(state, after, context, *, keep=1):
    return -keep


@dataclass(frozen=True)
class Called:
    keep: float

    def __call__(self, state, after, context):
        return self.keep

    def plain(self, state, after, context):
        return self.keep


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (closing_over(0.25), closing_over(0.5)),
        (closing_over(torch.ones(3)), closing_over(torch.tensor([1.0, 1.0, 2.0]))),
        (closing_over(torch.ones(3)), closing_over(torch.ones(3, 1))),
        (closing_over({"a": 1}), closing_over({"a": 2})),
        (closing_over(["a", "b"]), closing_over(["ab"])),
        (closing_over(torch.sin), closing_over(torch.cos)),
        (with_compress(first), with_compress(second)),
        (with_compress(first), with_compress(partial(first, keep=2))),
        (with_compress(partial(first, keep=1)), with_compress(partial(first, keep=2))),
        (with_compress(Called(1.0)), with_compress(Called(2.0))),
        (with_compress(Called(1.0).plain), with_compress(Called(2.0).plain)),
        (with_compress(lambda *given: 1), with_compress(lambda *given: 2)),
        (with_compress(first), replace(with_compress(first), values="int4")),
    ],
)
def test_what_differs_in_a_bound_value_differs(one, other):
    assert fingerprint(one) != fingerprint(other)


def test_what_was_built_twice_is_the_same():
    assert fingerprint(closing_over({"b": 1, "a": torch.ones(2)})) == fingerprint(
        closing_over({"a": torch.ones(2), "b": 1})
    )
    assert [fingerprint(build(name)) for name in METHODS] == [fingerprint(build(name)) for name in METHODS]
    assert len({fingerprint(build(name)) for name in METHODS}) == len(METHODS)


def test_a_function_that_holds_itself_ends():
    def compress(state, after, context):
        return compress

    assert len(fingerprint(with_compress(compress))) == 32


def test_it_is_the_same_in_another_process():
    code = (
        "from fedloom.methods.table import METHODS, build\nfrom fedloom.methods.fingerprint import fingerprint\n"
        "print(*(fingerprint(build(name)) for name in METHODS))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [fingerprint(build(name)) for name in METHODS]
