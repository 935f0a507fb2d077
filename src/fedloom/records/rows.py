"""Rows of a ledger about what happened in rounds; those about a run as a whole are in `records.session`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, TypeAdapter

from fedloom.records.session import FORBID, Answer, End, Number, Session

Direction: TypeAlias = Literal["up", "down"]
About: TypeAlias = Literal["", "refused", "diverged"]
SUM_KINDS: Mapping[str, tuple[str, str]] = {
    "announce": ("sum:keys", "sum:invitation"),
    "share": ("sum:shares", "sum:keys"),
    "mask": ("masked", "sum:shares"),
    "agree": ("sum:agreement", "sum:list"),
    "open": ("sum:opening", "sum:agreement"),
}
"""Phase of a secure sum → the kinds of what goes up and down in it. The masked vector is the update itself."""


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """Modules of the same largest rank that the same clients train (`clients` is empty where all do).

    width: Σ (m + n) over their shapes (m, n), so that a pair of rank r in each has r · width values.
    """

    __pydantic_config__ = FORBID
    width: int
    rank: int
    clients: Annotated[tuple[str, ...], Field(strict=False)] = ()


@dataclass(frozen=True, slots=True)
class RunRow:
    """The first row: what the run is. `adapter_values` counts the values of the server's A and B factors.

    A run that is given another number of rounds has the row once more: the last one holds.
    client_values: client → its values, of clients that hold fewer because of a lower rank or fewer modules.
    modules: what is adapted, if told. baseline_r: rank of the dense run to compare with, None for the largest.
    data_bytes: client → bytes of its examples, compressed once by data_coding, where they are known.
    """

    __pydantic_config__ = FORBID
    row: Literal["run"] = field(default="run", kw_only=True)
    method: str
    model: str
    clients: Annotated[tuple[str, ...], Field(strict=False)]
    num_rounds: int
    adapter_values: int
    seed: int
    client_values: Mapping[str, int] = field(default_factory=dict)
    modules: Annotated[tuple[ModuleGroup, ...], Field(strict=False)] = ()
    baseline_r: int | None = None
    data_bytes: Mapping[str, int] = field(default_factory=dict)
    data_coding: str = ""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One payload between the server and a client. `bytes` = len(payload), `parts` says what they are spent on.

    Of what goes down: version is that of the state which the client has by then, as far as the server knows (-1: none
    of the run's; None in older ledgers); delivery, whether it is the result, sent when the rounds are over.
    kind: of the payload's header, or one of `SUM_KINDS`.
    undone: it travelled between machines in a round that a crash undid, and that was played again. Its bytes count; it
    says nothing of who answered in the round.
    """

    __pydantic_config__ = FORBID
    row: Literal["transfer"] = field(default="transfer", kw_only=True)
    round: int
    client: str
    direction: Direction
    kind: str
    bytes: int
    parts: Mapping[str, int] = field(default_factory=dict)
    seconds: Number = 0.0
    version: int | None = None
    delivery: bool = False
    undone: bool = False

    @property
    def is_talk(self) -> bool:
        """Whether it is a message of a secure sum beside the masked vector: neither an update nor a broadcast."""
        return self.kind.startswith("sum:")


@dataclass(frozen=True, slots=True)
class Relay:
    """Something that travelled between a regional server and the root, in a run with federation.regions.

    kind: "facts" (what a region says of its clients' updates), "shares" (what each of them counts for), "sum" (of its
    clients' updates), or the kind of a payload that the region hands on to its clients. delivery: as of `Transfer`.
    """

    __pydantic_config__ = FORBID
    row: Literal["relay"] = field(default="relay", kw_only=True)
    round: int
    region: str
    direction: Direction
    kind: str
    bytes: int
    delivery: bool = False


@dataclass(frozen=True, slots=True)
class Training:
    """One client's local training: mean loss, optimiser steps, examples it holds."""

    __pydantic_config__ = FORBID
    row: Literal["training"] = field(default="training", kw_only=True)
    round: int
    client: str
    loss: Number
    steps: int
    examples: int
    seconds: Number = 0.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The global model on one domain's held-out examples: exact match (0 … 1) and mean loss. Round 0 is the start.

    loss: nats a token of the answers. examples, tokens, bytes: how many were scored, and the length of their answers;
    0 in ledgers that do not say. metrics: the scores (0 … 1) that evaluation.metrics asks for beside these.
    """

    __pydantic_config__ = FORBID
    row: Literal["evaluation"] = field(default="evaluation", kw_only=True)
    round: int
    domain: str
    exact_match: Number
    loss: Number
    seconds: Number = 0.0
    examples: int = 0
    tokens: int = 0
    bytes: int = 0
    metrics: Mapping[str, Number] = field(default_factory=dict)

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits a byte of the answers' UTF-8 text, comparable between tokenizers; None if not known.

        The end-of-sequence token counts among the nats: an answer that is told without its end is not told.
        """
        return self.loss * self.tokens / self.bytes / math.log(2) if self.bytes else None


@dataclass(frozen=True, slots=True)
class Validation:
    """The global model on one domain's validation examples, on which a round is chosen; no score of the run."""

    __pydantic_config__ = FORBID
    row: Literal["validation"] = field(default="validation", kw_only=True)
    round: int
    domain: str
    exact_match: Number
    loss: Number


@dataclass(frozen=True, slots=True)
class Choice:
    """What the validation split decided: the round in which the run ended, and the round whose model it leaves."""

    __pydantic_config__ = FORBID
    row: Literal["choice"] = field(default="choice", kw_only=True)
    round: int
    exported: int


@dataclass(frozen=True, slots=True)
class Aggregation:
    """The server's part of a round, with the method's own numbers. version: of the state that it led to."""

    __pydantic_config__ = FORBID
    row: Literal["aggregation"] = field(default="aggregation", kw_only=True)
    round: int
    stats: Mapping[str, Number] = field(default_factory=dict)
    seconds: Number = 0.0
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Roll:
    """Who answered in one round of a federation across machines, who failed and why, who came too late.

    tries counts how often the missing were asked: 1 where nobody was missed.
    """

    __pydantic_config__ = FORBID
    row: Literal["roll"] = field(default="roll", kw_only=True)
    round: int
    answered: Annotated[tuple[str, ...], Field(strict=False)]
    failed: Mapping[str, str] = field(default_factory=dict)
    late: Mapping[str, str] = field(default_factory=dict)
    tries: int = 1
    seconds: Number = 0.0


@dataclass(frozen=True, slots=True)
class Presence:
    """Which sites of a federation across machines can be asked, and which cannot and why: each is in one of the two.

    Such a row is written when this differs from the last one, at the start (round 1, before anybody is asked), in the
    middle of a round and while the result is delivered. round: the one in progress. What holds now is the last row's.
    """

    __pydantic_config__ = FORBID
    row: Literal["presence"] = field(default="presence", kw_only=True)
    round: int
    online: Annotated[tuple[str, ...], Field(strict=False)]
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth saying in words: who dropped out, who was refused and why.

    about: what it is about, where programs have to know: an update that was refused, or a training that diverged.
    """

    __pydantic_config__ = FORBID
    row: Literal["note"] = field(default="note", kw_only=True)
    round: int
    text: str
    about: About = ""


Row: TypeAlias = (
    RunRow
    | Transfer
    | Relay
    | Training
    | Evaluation
    | Validation
    | Aggregation
    | Presence
    | Roll
    | Note
    | Choice
    | Session
    | Answer
    | End
)
ROWS: TypeAdapter[Row] = TypeAdapter(Annotated[Row, Field(discriminator="row")])
"""Reads a row from JSON, by its field `row`."""
