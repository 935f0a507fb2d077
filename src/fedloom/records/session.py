"""Rows of a ledger about a run as a whole: its sessions, what the model answered, how it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, ConfigDict

from fedloom.records.text import LONG, to_printable

FORBID = ConfigDict(extra="forbid", strict=True)
EndStatus: TypeAlias = Literal["finished", "failed", "interrupted"]
Number: TypeAlias = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float; NaN and infinity, which JSON lacks, are written as null and read as NaN."""


@dataclass(frozen=True, slots=True)
class Session:
    """A stretch of a run in one process, from its start or its resumption: when and where, and with which settings.

    round: rounds that were over. time: ISO 8601, UTC. settings: TOML. seconds: what the run had taken before.
    certificates: whose ("server", "ca") → when it ends, ISO 8601, UTC, of a run across machines.
    """

    __pydantic_config__ = FORBID
    row: Literal["session"] = field(default="session", kw_only=True)
    round: int
    time: str
    settings: str
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    seconds: Number = 0.0
    certificates: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model answered to a held-out example after a round: 0 is before the first."""

    __pydantic_config__ = FORBID
    row: Literal["answer"] = field(default="answer", kw_only=True)
    round: int
    domain: str
    prompt: str
    expected: str
    text: str


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended, after so many rounds: its last row, which is taken back where the run goes on.

    reason: why it failed. seconds: what the run took in all its sessions. lost_energy: the share of ‖ΔW‖² that the
    exported adapter lacks, because output.max_rank caps its rank.
    """

    __pydantic_config__ = FORBID
    row: Literal["end"] = field(default="end", kw_only=True)
    round: int
    status: EndStatus
    reason: str = ""
    seconds: Number = 0.0
    lost_energy: Number = 0.0


def describe_error(error: BaseException) -> tuple[EndStatus, str]:
    """How a run ended that an error ended: interrupted, by whoever ends its process, or failed and why."""
    if not isinstance(error, Exception):
        return "interrupted", ""
    return "failed", to_printable(str(error) or type(error).__name__, LONG)
