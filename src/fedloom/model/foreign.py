"""Libraries at work on a stranger's file: whatever they raise becomes one line, and templates end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2.utils import Namespace

from fedloom.errors import FedloomError, NumericError

CHARACTERS = 300
"""Characters of a library's message that are repeated: enough to recognise it."""
MOST_STEPS = 300_000
"""Lines and calls of a template for one conversation. A long one with a large template takes some ten thousand."""
MOST_SECONDS = 60.0
"""CPU seconds of the thread: bounds what calls of filters cost, which are not counted as steps."""
LONGEST = 2**18
"""Characters of a text, or entries of a list, that a template may build up beside four times its input."""
_EVERY = 8
"""Steps between two looks at a template's variables: doubling in every step, a text can grow 256-fold between them."""
_Trace = Callable[[FrameType, str, Any], Any]


@contextmanager
def raise_in_one_line(kind: type[FedloomError], text: str) -> Iterator[None]:
    """Turn what a library raises within into one error of this kind, `text` and then the reason.

    fedloom's own errors pass. So do interrupts and exits, but not a panic of Rust code, though it is not an Exception.
    """
    try:
        yield
    except (FedloomError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise kind(f"{text}: {error_reason(error)}") from None


def error_reason(error: BaseException) -> str:
    """What an error says, in one line of printable characters; its type where it says nothing."""
    words = " ".join(str(error).split())[:CHARACTERS] or type(error).__name__
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)


@contextmanager
def limit_steps(file: str, given: int) -> Iterator[None]:
    """While it lasts, Python code of `file` may take MOST_STEPS and MOST_SECONDS, and build texts in proportion.

    given: characters of input. Raises NumericError beyond. Steps are counted, so that the outcome is the same on every
    machine; a single operation of C code is not interrupted.
    """
    before = sys.gettrace()
    sys.settrace(_counter(file, LONGEST + 4 * given, time.thread_time() + MOST_SECONDS))
    try:
        yield
    finally:
        sys.settrace(before)


def _counter(file: str, longest: int, deadline: float) -> _Trace:
    """A trace function: calls of all functions and lines of the file's own are steps."""
    steps = 0

    def line(frame: FrameType, event: str, argument: object) -> _Trace:
        nonlocal steps
        steps += 1
        if steps > MOST_STEPS:
            raise NumericError(f"it takes more than {MOST_STEPS:,} steps")
        if steps % _EVERY == 0:
            if time.thread_time() > deadline:
                raise NumericError(f"it takes more than {MOST_SECONDS:.0f} seconds")
            if frame.f_code.co_filename == file and any(_size(value) > longest for value in frame.f_locals.values()):
                raise NumericError(f"it builds a text or list of more than {longest:,} characters or entries")
        return line

    def call(frame: FrameType, event: str, argument: object) -> _Trace | None:
        line(frame, event, argument)
        return line if frame.f_code.co_filename == file else None

    return call


def _size(value: object) -> int:
    """Characters, entries or digits of a template's variable, and of those in a Jinja namespace."""
    if isinstance(value, str | list | tuple | dict):
        return len(value)
    if isinstance(value, int):
        return value.bit_length()
    if not isinstance(value, Namespace):
        return 0
    # Past its own look-up, which knows the template's names alone.
    held = object.__getattribute__(value, "_Namespace__attrs")
    return max((_size(part) for part in held.values() if not isinstance(part, Namespace)), default=0)
