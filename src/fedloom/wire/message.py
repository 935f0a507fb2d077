"""What is said in one payload: a small typed header and named entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedloom.compress.entries import Entry

Kind = Literal["update", "change", "state"]


@dataclass(frozen=True, slots=True)
class Header:
    """Who may use the payload and how.

    kind: "update" (client → server), "change" (server → clients: apply it to the base) or "state"
    (server → client: replace what you hold). `base_version` and `base_digest` (32 hex digits) name the
    global state that the payload was computed from or, for "state", is. `result_digest` names the state after a
    change is applied, and the sender of an update. `num_examples` weighs an update.
    """

    kind: Kind
    method: str
    round: int
    base_version: int
    base_digest: str
    result_digest: str = ""
    num_examples: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Message:
    """A header and its entries, by name: `<module>/<part>`."""

    header: Header
    entries: Mapping[str, Entry]
