"""Nodes that take their time, on a clock of their own: what happens when a site is slow, stopped, away or lost.

Nothing waits in truth. The server's modules see the clock's time, and their sleep sets it forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from desks import DeskGrid, FakeNode
from flwr.app import Context, Error, Message, RecordDict

from fedloom.flower import delivery, filling, fleet, gathering, messages, muster, relay
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.flower.settings import shared_settings
from fedloom.site.protocol import Parcel

EXPIRED = Error(3, "the message is not kept any more")
OFFLINE = Error(5, "the node is unavailable")


@dataclass
class Clock:
    """Stands for the module `time` in the modules of the server."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def install(self, monkeypatch) -> None:
        for module in (delivery, filling, fleet, gathering, messages, muster):
            monkeypatch.setattr(module, "time", self)
            for name, value in (("POLL_SECONDS", 0.25), ("LOOK_SECONDS", 1.0)):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)


@dataclass
class Waiting:
    """A message at a node, not begun or being worked on until `ends`."""

    message: Message
    sent: float
    ends: float | None = None

    @property
    def facts(self) -> dict:
        return dict(unpack_parcel(self.message.content).facts)


Ends = Callable[[str, str, int, float], float]
"""(site, ask, round, when it begins) → when it is done."""


def at_once(site: str, ask: str, round: int, begins: float) -> float:
    return begins + 1.0 * (ask == "turn")


@dataclass
class QueueGrid(DeskGrid):
    """A node works on one message after the other. One that is `prompt` heeds withdrawals and what has expired."""

    clock: Clock = field(default_factory=Clock)
    ends: Ends = at_once
    prompt: bool = False
    queues: dict[int, list[Waiting]] = field(default_factory=dict)
    sent: list[tuple[float, str, str, int]] = field(default_factory=list)
    happens: list[tuple[float, Callable[[QueueGrid], None]]] = field(default_factory=list)
    replies: dict[str, Message] = field(default_factory=dict)
    most_turns: int = 0  # that lay at one node at the same time

    def get_nodes(self) -> list[FakeNode]:
        self.advance()
        return super().get_nodes()

    def handed(self, message: Message) -> str:
        identifier = message.object_id
        message.metadata.__dict__.update(_message_id=identifier, _run_id=1, _src_node_id=1)
        node = next(node for node in self.nodes if node.node_id == message.metadata.dst_node_id)
        held = Waiting(message, self.clock.now)
        facts = held.facts
        self.sent.append((self.clock.now, node.desk.site.name, str(facts["ask"]), int(facts["round"])))
        queue = self.queues.setdefault(node.node_id, [])
        queue.append(held)
        self.most_turns = max(self.most_turns, sum(one.facts["ask"] == "turn" for one in queue))
        return identifier

    def pull_messages(self, message_ids: list[str]) -> list[Message]:
        self.advance()
        return [self.replies.pop(identifier) for identifier in message_ids if identifier in self.replies]

    def advance(self) -> None:
        """Have everything done that is done by now."""
        while self.happens and self.happens[0][0] <= self.clock.now:
            self.happens.pop(0)[1](self)
        for node in self.nodes:
            self.work(node)

    def work(self, node: FakeNode) -> None:
        queue, free = self.queues.setdefault(node.node_id, []), 0.0
        if node.status != "online":
            for held in [*queue]:
                self.reply(held, OFFLINE)
            return
        if self.prompt:
            for held in [held for held in queue if held.facts["ask"] == "withdraw"]:
                queue.remove(held)
                for turn in [turn for turn in queue if _is_turn(turn, int(held.facts["round"]))]:
                    queue.remove(turn)
                    self.reply(turn, Parcel({"dropped": "withdrawn", "protocol": 2}))
                self.reply(held, Parcel({"protocol": 2}))
        while queue:
            held = queue[0]
            facts, begins = held.facts, max(free, held.sent)
            if held.ends is None:
                if begins > held.sent + held.message.metadata.ttl:
                    self.reply(queue.pop(0), EXPIRED)
                    continue
                if self.prompt and begins > held.sent + float(facts.get("expires", 1e9)):
                    self.reply(queue.pop(0), Parcel({"dropped": "expired", "protocol": 2}))
                    continue
                held.ends = self.ends(node.desk.site.name, str(facts["ask"]), int(facts["round"]), begins)
            if held.ends > self.clock.now:
                break
            free = held.ends
            queue.pop(0)
            self.finish(node, held)

    def finish(self, node: FakeNode, held: Waiting) -> None:
        facts = held.facts
        self.log.append((node.desk.site.name, str(facts["ask"]), int(facts["round"])))
        context = Context(1, node.node_id, {}, RecordDict(), {"settings": shared_settings(self.config)})
        reply = relay.relay(held.message, context, lambda parcel, _: node.desk.answer(parcel))
        late = held.ends is not None and held.ends > held.sent + held.message.metadata.ttl
        self.reply(held, EXPIRED if late else unpack_parcel(reply.content))

    def reply(self, held: Waiting, content: Parcel | Error) -> None:
        body = pack_parcel(content) if isinstance(content, Parcel) else content
        self.replies[held.message.metadata.message_id] = Message(body, reply_to=held.message)


def _is_turn(held: Waiting, round: int) -> bool:
    return (held.facts["ask"], held.facts["round"]) == ("turn", round)
