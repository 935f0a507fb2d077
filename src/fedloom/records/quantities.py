"""The types of settings: bounded texts, numbers, lists and tables, and quantities of bytes such as "8MiB" or "1%".

A server writes the settings that its sites read, so every type has a bound: a site that parses them has promised no
memory and no time yet. A site's policy may set narrower bounds (`site.policy`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

MOST_RANK = 4096
"""Far above any LoRA that is trained; a rank takes memory before anything else can be asked about it."""
MOST_PATTERNS = 1024
"""Patterns in one table, or modules in one list: more than a model has kinds of layers."""
MOST_CLIENTS = 100_000
MOST_STEPS = 10**6
"""Steps, rounds and micro-batches: hours of work each at the least."""
MOST_WORKERS = 1024
"""Processes on one machine."""
MOST_COUNT = 2**31 - 1
"""Numbers that are only compared or divided by, and so cost nothing."""

Text: TypeAlias = Annotated[str, Field(max_length=4096)]
Name: TypeAlias = Annotated[str, Field(max_length=256)]
Pattern: TypeAlias = Annotated[str, Field(max_length=200)]
Scalar: TypeAlias = bool | Annotated[int, Field(ge=-(2**63), lt=2**63)] | float | Text
Probability: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Rank: TypeAlias = Annotated[int, Field(ge=1, le=MOST_RANK)]
Alpha: TypeAlias = Annotated[float, Field(gt=0)]
Patterns: TypeAlias = Annotated[tuple[Pattern, ...], Field(strict=False, max_length=MOST_PATTERNS)]
TargetModules: TypeAlias = Literal["all-linear"] | Patterns | Pattern
Ranks: TypeAlias = Annotated[dict[Pattern, Rank], Field(max_length=MOST_PATTERNS)]
Alphas: TypeAlias = Annotated[dict[Pattern, Alpha], Field(max_length=MOST_PATTERNS)]
Rate: TypeAlias = Annotated[float, Field(gt=0)]
Steps: TypeAlias = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Epochs: TypeAlias = Annotated[float, Field(gt=0, le=1000)]
Batch: TypeAlias = Annotated[int, Field(ge=1, le=2**16)]
Examples: TypeAlias = Annotated[dict[Name, Annotated[int, Field(ge=1, le=MOST_COUNT)]], Field(max_length=MOST_CLIENTS)]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(text: str) -> int:
    """Bytes meant by "8MiB", "500 KB" or "1200". Raises ValueError that says what is expected."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?B?", text.strip())
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is not a number of bytes; expected one such as '8MiB', '500KB' or '1200'")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _checked_bytes(text: str) -> str:
    parse_bytes(text)
    return text


def parse_budget(text: str) -> tuple[float, int]:
    """(share, 0) of "1%", (0, bytes) of "8MiB". Raises ValueError that says what is expected."""
    if re.fullmatch(r"\d+(?:\.\d+)?\s*%", text.strip()) and float(text.strip()[:-1]):
        return float(text.strip()[:-1]) / 100, 0
    try:
        return 0.0, parse_bytes(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a budget; expected bytes such as '8MiB' or '1200', or a share of dense fp32 such as '1%'"
        ) from None


def _checked_budget(text: str) -> str:
    parse_budget(text)
    return text


@dataclass(frozen=True, slots=True)
class ClientBudget:
    """What one client may take in a whole run: `size` bytes, or else a share of its data or of dense fp32."""

    size: int = 0
    of_data: float = 0.0
    of_dense: float = 0.0


def parse_client_budget(text: str) -> ClientBudget:
    """What "15KB", "0.3%" (of dense fp32) or "80% of data" means. Raises ValueError that says what is expected."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%( of data)?", text.strip())
    if match and float(match[1]):
        share = float(match[1]) / 100
        return ClientBudget(of_data=share) if match[2] else ClientBudget(of_dense=share)
    try:
        return ClientBudget(parse_bytes(text))
    except ValueError:
        raise ValueError(
            f"{text!r} is not a client's budget; expected bytes such as '15KB', a share of what dense fp32 takes such "
            "as '0.3%', or of what its own examples take compressed, such as '80% of data'"
        ) from None


def _checked_client_budget(text: str) -> str:
    parse_client_budget(text)
    return text


def _number_as_text(value: object) -> object:
    """A whole number without quotes means the same: --set wire.budget=1200."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Bytes: TypeAlias = Annotated[str, Field(max_length=32), AfterValidator(_checked_bytes)]
ClientBudgetText: TypeAlias = Annotated[
    str, BeforeValidator(_number_as_text), Field(max_length=32), AfterValidator(_checked_client_budget)
]
BudgetText: TypeAlias = Annotated[
    str, BeforeValidator(_number_as_text), Field(max_length=32), AfterValidator(_checked_budget)
]
