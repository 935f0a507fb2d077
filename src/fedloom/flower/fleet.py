"""The sites as the server sees them: names, nodes, what was asked of whom, what came back.

Flower tells late, or not at all, that a node was lost (a killed SuperNode: after some 45 s, under the server's own
node id), so replies are matched by the message that they answer, and a node that was started anew since it was asked
is known by its time of activation.

A site has one turn at a time. It is over when the site has answered it, or its withdrawal, or was started anew, or when
Flower says that it is lost. Until then the site is asked for no other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message

from fedloom.errors import VersionError
from fedloom.flower.messages import Grid, Node, Reply, SentRequest, read_reply
from fedloom.flower.payload import pack_parcel
from fedloom.records.ledger import Presence
from fedloom.site.protocol import NEWEST_ALONE, SPOKEN, WITHDRAWS, Fact, Parcel, write_facts

TTL_SECONDS = 12 * 3600.0
"""How long Flower keeps a message that says nothing of it: longer than any deadline that makes sense for a round."""
ANSWER_SECONDS = 60.0
"""How much longer than a turn is worth beginning Flower keeps it at least, so that its answer can come back. Whoever
asks allows as much again as a round may take: what is late is refused, but its bytes are counted."""
GREET_SECONDS = 30.0
"""How long a node that could not take part is left alone before it is greeted again."""
LARGE = 2**23
"""Bytes of an answer from which on not several of them are held at once. A request more for each costs milliseconds."""
AWAY = "is not connected"
"""What is said of a site that nobody hears of. Flower tells of nodes that are connected, and of no others."""


@dataclass(frozen=True, slots=True)
class Stranger:
    """A node that may not take part: why, which of the sites it is if that is known, when it was told so and started.

    at: by the clock of `time.monotonic`. activated: a node that was started anew since may be greeted at once.
    """

    node: int
    site: str
    reason: str
    at: float
    activated: str = ""

    @property
    def text(self) -> str:
        """All of it in words."""
        return f"{f'client {self.site}' if self.site else f'node {self.node}'} cannot take part: {self.reason}"


@dataclass(eq=False, slots=True)
class Fleet:
    """All nodes. `facts` go with every request; `expected` are the names of the sites that take part.

    registered: node → name, for every node that Flower ever told of, whether it is there or not. spoken: node → the
    protocol that its site is asked in; of a node that has not answered yet, the newest. turns: site → the message that
    asked it for its turn, which may be over. expects: bytes that an answer may have; once one has brought
    payloads, as many as the last such one.
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
    turns: dict[str, str] = field(default_factory=dict)
    expects: int = 0

    def look(self) -> None:
        """Ask the SuperLink which nodes are there, and greet those that have not said their name.

        Those that could not take part are greeted again after a while: their site may have mended what was wrong.
        """
        told = list(self.grid.get_nodes())
        self.registered |= {node.node_id: node.name for node in told if node.name}
        self.nodes = {node.node_id: node for node in told if node.status == "online"}
        past = time.monotonic() - GREET_SECONDS
        recent = {
            node
            for node, stranger in self.strangers.items()
            if stranger.at > past and node in self.nodes and self.nodes[node].last_activated_at == stranger.activated
        }
        asked = {asked.node for asked in self.outstanding.values() if not self.has_restarted(asked)}
        known = {*self.names.values(), *recent, *asked}
        for node in self.nodes:
            if node not in known:
                self.post(node, "", "hello", 0, Parcel({"time": time.time()}))

    def is_here(self, site: str) -> bool:
        """Whether the site's node is connected."""
        return self.names.get(site) in self.nodes

    @property
    def is_greeting(self) -> bool:
        """Whether a node that is connected has yet to say its name."""
        return any(
            asked.ask == "hello" and asked.node in self.nodes and not self.has_restarted(asked)
            for asked in self.outstanding.values()
        )

    def is_asked(self, site: str, ask: str, since: float = 0.0) -> bool:
        """Whether the site was asked this, by the clock of `time.monotonic` since then, and may still answer."""
        return any(
            (asked.site, asked.ask) == (site, ask) and asked.at >= since and not self.has_restarted(asked)
            for asked in self.outstanding.values()
        )

    def open_turn(self, site: str) -> SentRequest | None:
        """The turn that the site was asked for and that is not over."""
        asked = self.outstanding.get(self.turns.get(site, ""))
        return None if asked is None or self.has_restarted(asked) else asked

    def has_restarted(self, asked: SentRequest) -> bool:
        """Whether the node was started anew since it was asked: what it was doing then is lost."""
        node = self.nodes.get(asked.node)
        return node is not None and node.last_activated_at != asked.activated

    def post(self, node: int, site: str, ask: str, round: int, parcel: Parcel, ttl: float = TTL_SECONDS) -> None:
        """Send a request to a node, which Flower keeps for `ttl` seconds."""
        facts = write_facts(
            {**self.facts, **parcel.facts, "ask": ask, "round": round}, self.spoken.get(node, SPOKEN.newest)
        )
        kind = "train" if ask == "turn" else "query"
        message = Message(pack_parcel(Parcel(facts, parcel.payloads)), node, kind, ttl=ttl, group_id=str(round))
        activated = self.nodes[node].last_activated_at if node in self.nodes else ""
        for identifier in self.grid.push_messages([message]):
            if identifier:
                self.outstanding[identifier] = SentRequest(node, site, ask, round, activated, time.monotonic())
                if ask == "turn":
                    self.turns[site] = identifier

    def takes_newest(self, site: str) -> bool:
        """Whether a site takes the newest broadcast without those before it, where that says all there is."""
        return self.spoken.get(self.names[site], SPOKEN.newest) >= NEWEST_ALONE

    def withdraw(self, turn: SentRequest) -> None:
        """Tell a site that a turn is not wanted any more, if it understands that."""
        if self.spoken.get(turn.node, SPOKEN.newest) >= WITHDRAWS:
            self.post(turn.node, turn.site, "withdraw", turn.round, Parcel({}))

    def withdraw_all(self) -> None:
        """Tell every site that is at a turn that it is not wanted any more: after asynchronous rounds some are."""
        for turn in [turn for site in self.turns if (turn := self.open_turn(site)) is not None]:
            self.withdraw(turn)

    def collect(self) -> Iterator[Reply]:
        """What has come since the last call, one after the other. Replies to what nobody asked are dropped.

        A reply is as large as its payload, and let go of here before the next one is read. Flower hands over at once
        all that have come of those that it is asked for: where they are large, it is asked for one after the other.
        """
        waiting = list(self.outstanding)
        size = 1 if self.expects >= LARGE else max(len(waiting), 1)
        for start in range(0, len(waiting), size):
            wanted = [identifier for identifier in waiting[start : start + size] if identifier in self.outstanding]
            came = deque(self.grid.pull_messages(wanted) if wanted else ())
            while came:
                reply = self.read(came.popleft())
                if reply is not None:
                    yield reply
                del reply

    def read(self, message: Message) -> Reply | None:
        """What a message says; None if nobody asked for it."""
        asked = self.outstanding.pop(message.metadata.reply_to_message_id, None)
        if asked is None:
            return None
        reply = read_reply(asked, message)
        self.expects = sum(map(len, reply.parcel.payloads if reply.parcel else ())) or self.expects
        self.close_withdrawn(reply)
        return reply

    def close_withdrawn(self, reply: Reply) -> None:
        """A site that has answered a withdrawal works on that turn no more. What it sent before may still arrive."""
        asked = reply.asked
        turn = self.open_turn(asked.site)
        if asked.ask == "withdraw" and reply.parcel and not reply.error and turn and turn.round == asked.round:
            del self.turns[asked.site]

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
            return self.refuse(node, claimed, str(error))
        if not reason:
            self.names[claimed] = node
            self.strangers.pop(node, None)
            return None
        return self.refuse(node, claimed if reply.error else "", reason)

    def refuse(self, node: int, claimed: str, reason: str) -> str | None:
        """Remember that a node cannot take part; why, in words, unless that was said before.

        claimed: the name that its own refusal gave, which is believed as long as it is nobody else's.
        """
        free = claimed in self.expected and claimed not in self.registered.values()
        site = self.registered.get(node) or (claimed if free else "")
        before = self.strangers.get(node)
        told = before is not None and _without_reference(before.reason) == _without_reference(reason)
        if before is not None and told:  # its first reference finds the whole text as well as any other
            reason = before.reason
        activated = self.nodes[node].last_activated_at if node in self.nodes else ""
        self.strangers[node] = Stranger(node, site, reason, time.monotonic(), activated)
        return None if told else self.strangers[node].text

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

    def presence(self, round: int) -> Presence:
        """Which sites can be asked, and why others cannot, as a row of the ledger."""
        missing = {site: reason for site in sorted(self.expected) if (reason := self.explain_absence(site))}
        return Presence(round, tuple(sorted(set(self.expected) - missing.keys())), missing)

    def explain_absence(self, site: str) -> str:
        """Why a site cannot be asked; "" if it can."""
        if self.is_here(site):
            return ""
        for stranger in self.strangers.values():
            if stranger.site == site and stranger.node in self.nodes:
                return f"is there but cannot take part: {stranger.reason}"
        if any(self.registered.get(node) == site for node in self.nodes):
            return "is there, but its worker has not answered yet"
        return AWAY


def _without_reference(reason: str) -> str:
    """A site's refusal without the number that finds it in the site's log, which is another one each time."""
    return reason.partition(" (reference ")[0]
