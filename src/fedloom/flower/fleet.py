"""The sites as the server sees them: names, nodes, what was asked of whom, what came back.

Flower tells late, or not at all, that a node was lost (a killed SuperNode: after some 45 s, under the server's own
node id), so replies are matched by the message that they answer, and a node that was started anew since it was asked
is known by its time of activation.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message

from fedloom.errors import FedloomError, VersionError
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.records.text import to_printable
from fedloom.site.protocol import SPOKEN, Fact, Parcel, Statement, parse_statement, write_facts

GONE = frozenset({5, 8, 9, 10})
"""Flower's codes of errors that say nothing about the request: node unavailable, app died, message unavailable …"""
TTL_SECONDS = 12 * 3600.0
"""How long Flower keeps a message: longer than any deadline that makes sense for a round."""
GREET_SECONDS = 30.0
"""How long a node that could not take part is left alone before it is greeted again."""


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
        """Every SuperNode of the federation, whether it is there or not."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send; the identifiers come back."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there."""


@dataclass(frozen=True, slots=True)
class Stranger:
    """A node that may not take part, why, and when it was told so."""

    reason: str
    at: float


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


@dataclass(eq=False, slots=True)
class Fleet:
    """All nodes. `facts` go with every request; `expected` are the names of the sites that take part.

    registered: node → name, for every node that Flower ever told of, whether it is there or not. spoken: node → the
    protocol that its site is asked in; of a node that has not answered yet, the newest.
    """

    grid: Grid
    facts: Mapping[str, Fact]
    expected: Sequence[str]
    names: dict[str, int] = field(default_factory=dict)
    strangers: dict[int, Stranger] = field(default_factory=dict)
    outstanding: dict[str, SentRequest] = field(default_factory=dict)
    nodes: dict[int, Node] = field(default_factory=dict)
    registered: dict[int, str] = field(default_factory=dict)
    spoken: dict[int, int] = field(default_factory=dict)

    def look(self) -> None:
        """Ask the SuperLink which nodes are there, and greet those that have not said their name.

        Those that could not take part are greeted again after a while: their site may have mended what was wrong.
        """
        told = list(self.grid.get_nodes())
        self.registered |= {node.node_id: node.name for node in told if node.name}
        self.nodes = {node.node_id: node for node in told if node.status == "online"}
        past = time.monotonic() - GREET_SECONDS
        recent = {node for node, stranger in self.strangers.items() if stranger.at > past}
        known = {*self.names.values(), *recent, *(asked.node for asked in self.outstanding.values())}
        for node in self.nodes:
            if node not in known:
                self.post(node, "", "hello", 0, Parcel({"time": time.time()}))

    def is_here(self, site: str) -> bool:
        """Whether the site's node is connected."""
        return self.names.get(site) in self.nodes

    def awaits_answer(self, site: str, round: int) -> bool:
        """Whether the site was asked in this round and may still answer."""
        return any(
            asked.site == site and asked.round == round and asked.ask != "hello" and not self.has_restarted(asked)
            for asked in self.outstanding.values()
        )

    def has_restarted(self, asked: SentRequest) -> bool:
        """Whether the node was started anew since it was asked: what it was doing then is lost."""
        node = self.nodes.get(asked.node)
        return node is not None and node.last_activated_at != asked.activated

    def post(self, node: int, site: str, ask: str, round: int, parcel: Parcel) -> None:
        """Send a request to a node."""
        facts = write_facts(
            {**self.facts, **parcel.facts, "ask": ask, "round": round}, self.spoken.get(node, SPOKEN.newest)
        )
        kind = "train" if ask == "turn" else "query"
        message = Message(pack_parcel(Parcel(facts, parcel.payloads)), node, kind, ttl=TTL_SECONDS, group_id=str(round))
        activated = self.nodes[node].last_activated_at if node in self.nodes else ""
        for identifier in self.grid.push_messages([message]):
            if identifier:
                self.outstanding[identifier] = SentRequest(node, site, ask, round, activated, time.monotonic())

    def collect(self) -> list[Reply]:
        """What has come since the last call. Replies to what nobody asked are dropped."""
        replies = []
        for message in self.grid.pull_messages(list(self.outstanding)) if self.outstanding else ():
            asked = self.outstanding.pop(message.metadata.reply_to_message_id, None)
            if asked is not None:
                replies.append(_read(asked, message))
        return replies

    def introduce(self, reply: Reply) -> str | None:
        """Take a node's name from its answer to "hello"; the reason if it is refused, once.

        A name that the operator gave when the node was registered is binding; otherwise a name belongs to the node
        that said it first, for as long as it is connected.
        """
        node, claimed = reply.asked.node, reply.said.name
        if reply.gone:
            return None
        try:
            if self.lower_protocol(reply):
                return None
            reason = reply.error or self.objection(node, claimed)
        except VersionError as error:
            reason = str(error)
        if not reason:
            self.names[claimed] = node
            self.strangers.pop(node, None)
            return None
        known = node in self.strangers
        self.strangers[node] = Stranger(f"node {node} cannot take part: {reason}", time.monotonic())
        return None if known else self.strangers[node].reason

    def lower_protocol(self, reply: Reply) -> bool:
        """Note the protocol that a node's site is asked in from now on. True if it refused a newer one: greet it anew.

        Raises VersionError where it speaks none of this server's.
        """
        if reply.parcel is None:  # not the site's own words
            return False
        node = reply.asked.node
        before = self.spoken.get(node, SPOKEN.newest)
        self.spoken[node] = SPOKEN.agree(reply.said.protocol)
        return bool(reply.error) and self.spoken[node] < before

    def objection(self, node: int, claimed: str) -> str:
        """Why a node may not have the name that it says; "" if it may."""
        given = self.registered.get(node, "")
        if claimed not in self.expected:
            return f"it says that it is {claimed!r}, which is not among federation.participants"
        if given and given != claimed:
            return f"it says that it is {claimed!r}, but is registered as {given!r}"
        if not given and claimed in self.registered.values():
            return f"it says that it is {claimed!r}, which another node is registered as"
        if self.names.get(claimed, node) != node and self.is_here(claimed):
            return f"it says that it is {claimed!r}, as another node that is connected does"
        return ""


def _read(asked: SentRequest, message: Message) -> Reply:
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
