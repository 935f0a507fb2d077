"""What goes between the server and a node: a request on its way, and what came back for it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message

from fedloom.errors import FedloomError
from fedloom.flower.payload import unpack_parcel
from fedloom.records.text import to_printable
from fedloom.site.protocol import Parcel, Statement, parse_statement

GONE = frozenset({3, 4, 5, 8, 9, 10})
"""Flower's codes of errors that say nothing about the request: message or reply no longer kept, node unavailable, app
died …"""


class Node(Protocol):
    """What Flower tells of a SuperNode."""

    @property
    def node_id(self) -> int:
        """The same after a restart where nodes have keys."""

    @property
    def status(self) -> str:
        """Whether it is "online"."""

    @property
    def name(self) -> str:
        """The name that the operator registered; "" without node keys."""

    @property
    def last_activated_at(self) -> str:
        """When it was started last."""


class Grid(Protocol):
    """The part of flwr.serverapp.Grid that is used."""

    def get_nodes(self) -> Iterable[Node]:
        """Every SuperNode of the federation that is there; those that are not may be among them."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send; the identifiers come back."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there."""


@dataclass(frozen=True, slots=True)
class SentRequest:
    """A message on its way. site: "" where the node has not said its name."""

    node: int
    site: str
    ask: str
    round: int
    activated: str
    at: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for `asked`: a parcel, or an error; `gone` says that the node or its app was lost.

    said: the parcel's facts, checked. error: in one line that may be shown anywhere, whoever wrote it.
    """

    asked: SentRequest
    parcel: Parcel | None
    error: str = ""
    gone: bool = False
    said: Statement = Statement()

    @property
    def seconds(self) -> float:
        """Since the request was sent."""
        return time.monotonic() - self.asked.at


def read_reply(asked: SentRequest, message: Message) -> Reply:
    """Check a reply at the border: behind it, what a site says has the right type and size, and may be shown."""
    if message.has_error():
        error = message.error
        return Reply(asked, None, f"Flower's error {error.code}: {to_printable(str(error.reason))}", error.code in GONE)
    try:
        parcel = unpack_parcel(message.content)
        said = parse_statement(parcel.facts)
    except FedloomError as error:
        return Reply(asked, None, f"refused: {to_printable(str(error))}")
    return Reply(asked, parcel, to_printable(said.error or ""), said=said)
