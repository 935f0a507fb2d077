"""One line of the doctor's findings, and how to make one of a function that may raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedloom.errors import FedloomError

Outcome: TypeAlias = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: what was checked, its state, what was found, and what to do about it ("" where all is well)."""

    what: str
    outcome: Outcome
    found: str
    advice: str = ""


def ok(what: str, found: str) -> Check:
    """All is well."""
    return Check(what, "ok", found)


def warn(what: str, found: str, advice: str) -> Check:
    """It works, but somebody should know."""
    return Check(what, "warn", found, advice)


def fail(what: str, found: str, advice: str) -> Check:
    """It will not work, or is not safe."""
    return Check(what, "fail", found, advice)


def try_check(what: str, advice: str, check: Callable[[], Check]) -> Check:
    """The finding of `check`, or a failure that quotes the error that it raised."""
    try:
        return check()
    except (FedloomError, OSError, ValueError, LookupError) as error:
        return fail(what, " ".join(str(error).split()), advice)
