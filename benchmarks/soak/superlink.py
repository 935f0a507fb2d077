"""What stands for Flower: a SuperLink that keeps messages, and nodes that fetch them one at a time.

It behaves as flwr 1.41 was seen to: a node counts as online for a while after it was last heard; one that was killed
comes back when that time is over, as started anew, and what it was doing is lost; an answer waits at the node until the
line is there again; a run that has ended gets no more answers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.soak.machine import Killed, Machine, Machines
from benchmarks.soak.toy import assemble
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.flower.relay import relay
from fedloom.flower.settings import shared_settings
from fedloom.records.config import Config
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.protocol import Parcel

LEASE = 30.0
"""Seconds for which a node that is no longer heard counts as online."""
LOST = Error(5, "the node is unavailable")
LOST_AFTER = 45.0
"""Seconds after which Flower says that a killed node's message is lost."""


@dataclass(eq=False)
class Letter:
    """A message on its way to a node. session: of the server, whose messages end with it."""

    identifier: str
    message: Message
    session: int
    ask: str
    round: int


@dataclass(frozen=True)
class Carried:
    """A parcel that the link carried. what: digest of its payloads together, "" where there are none; fetched: session
    of the server, and in which look for answers.
    """

    site: str
    ask: str
    round: int
    bytes: int
    what: str
    spoilt: bool = False
    fetched: tuple[int, int] = (0, 0)


@dataclass(eq=False)
class Link:
    """The part of a Grid that the server uses. sent: what it posted; taken: the answers that it fetched.

    opened: hears of a round when its first turn is posted. hold, double, spoil_up, spoil_down: sites whose next answer
    or request is kept back for so long, comes twice, or has a bit changed.
    """

    machines: Machines
    rng: random.Random
    opened: Callable[[int], None]
    nodes: dict[int, SimNode] = field(default_factory=dict)
    sent: list[Carried] = field(default_factory=list)
    taken: list[Carried] = field(default_factory=list)
    began: dict[int, float] = field(default_factory=dict)
    hold: dict[str, float] = field(default_factory=dict)
    double: set[str] = field(default_factory=set)
    spoil_up: set[str] = field(default_factory=set)
    spoil_down: set[str] = field(default_factory=set)
    session: int = 0
    looks: int = 0
    away: bool = False
    _count: int = 0
    _answers: list[tuple[float, Letter, Message, Carried | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # what Flower's runtime sets

    def begin_session(self) -> None:
        """A run is submitted, anew or again: what an earlier one was waiting for ends."""
        self.session += 1
        self._answers.clear()
        for node in self.nodes.values():
            node.inbox.clear()

    def get_nodes(self) -> list[SimpleNamespace]:
        """Every node that is registered."""
        self.machines.here.step()
        return [node.told() for node in self.nodes.values() if node.registered]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages for their nodes."""
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        self._count += 1
        identifier = f"message-{self._count}"
        parcel = unpack_parcel(message.content)
        ask, round = str(parcel.facts["ask"]), int(parcel.facts.get("round") or 0)
        message.metadata.__dict__.update(_message_id=identifier, _run_id=1, _src_node_id=1)
        self.machines.here.step()
        node = self.nodes.get(message.metadata.dst_node_id)
        if node is None or not node.registered:
            return ""  # Flower takes no message for a node that it does not know
        if node.site.name in self.spoil_down and parcel.payloads:
            self.spoil_down.discard(node.site.name)
            message.content = pack_parcel(spoilt(parcel, self.rng))
        self.sent.append(carried(node.site.name, ask, round, parcel))
        letter = Letter(identifier, message, self.session, ask, round)
        if ask == "turn" and round not in self.began:
            self.began[round] = self.machines.timeline.now
            self.opened(round)
        node.arrive(letter)
        self.machines.here.step()
        return identifier

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that are there, each once unless it is doubled."""
        self.machines.here.step()
        asked, now = set(message_ids), self.machines.timeline.now
        due = [answer for answer in self._answers if answer[0] <= now and answer[1].identifier in asked]
        self._answers = [answer for answer in self._answers if answer not in due]
        self.looks += 1
        fetched = (self.session, self.looks)
        self.taken += [replace(told, fetched=fetched) for _, _, _, told in due if told is not None]
        return [message for _, _, message, _ in due]

    def answer(self, node: SimNode, letter: Letter, reply: Message, lost: bool = False) -> None:
        """Take a node's answer."""
        if letter.session != self.session:
            return
        now, site = self.machines.timeline.now, node.site.name
        told = None
        if not lost:
            parcel = unpack_parcel(reply.content)
            bent = letter.ask == "turn" and bool(parcel.payloads) and site in self.spoil_up
            told = carried(site, letter.ask, letter.round, parcel, bent)
            if bent:
                self.spoil_up.discard(site)
                reply = Message(pack_parcel(spoilt(parcel, self.rng)), reply_to=letter.message)
        at = now
        if letter.ask == "turn" and site in self.hold:
            at += self.hold.pop(site)
        self._answers.append((at, letter, reply, told))
        if letter.ask == "turn" and site in self.double:
            self.double.discard(site)
            self._answers.append((at + 0.5, letter, reply, None))


class SimNode:
    """A site: its node, its worker, and the desk in it. pace: of its training; version: what it adds to the protocol's.
    pulls: whether the node hands withdrawals to the worker while that trains, as `fedloom node` does and Flower's own
    does not.

    Whoever changes `line`, `certified` or `running` calls `changed` then.
    """

    def __init__(self, link: Link, number: int, site: SiteConfig, config: Config, rng: random.Random) -> None:
        self.link, self.number, self.site, self.config, self.rng = link, number, site, config, rng
        self.machine = Machine(site.name, Path(site.state))
        self.timeline = link.machines.timeline
        self.inbox: list[Letter] = []
        self.busy: Letter | None = None
        self.registered = self.line = self.certified = self.running = True
        self.stopped, self.pulls = False, number % 2 == 0
        self.withdrawal: Letter | None = None
        self.pace, self.version, self.starts = 1.0, 0, 1
        self.lease = 0.0
        self.desk: Desk | None = None
        self.start_worker()

    @property
    def connected(self) -> bool:
        """Whether it can talk to the SuperLink."""
        return self.registered and self.line and self.certified and self.running and not self.link.away

    def told(self) -> SimpleNamespace:
        """What the SuperLink says of it."""
        online = self.connected or self.timeline.now < self.lease
        return SimpleNamespace(
            node_id=self.number,
            status="online" if online else "offline",
            name=self.site.name,
            last_activated_at=f"start {self.starts}",
        )

    def start_worker(self) -> None:
        """Have a worker that knows what is on disk."""
        if self.desk is None:
            with self.link.machines.on(self.machine):
                self.desk = Desk(self.site, assemble)

    def kill_worker(self) -> None:
        """kill -9; what the worker was doing is done anew when it is back."""
        if self.desk is not None and self.desk.place is not None:
            self.desk.place.store.close()
        self.desk = None

    def kill_node(self) -> None:
        """kill -9 of the node; what it was asked is lost, and the SuperLink says so after a while."""
        self.running, self.lease = False, self.timeline.now + LEASE
        self.lose()

    def lose(self) -> None:
        """Forget what was being done."""
        letter, self.busy = self.busy, None
        if letter is not None:
            self.lose_letter(letter)

    def lose_letter(self, letter: Letter) -> None:
        """Have the SuperLink say after a while that a message is lost."""
        lost = Message(LOST, reply_to=letter.message)
        self.timeline.after(LOST_AFTER, lambda: self.link.answer(self, letter, lost, lost=True))

    def start_node(self) -> None:
        """Start the node; the SuperLink lets it in when it no longer takes it for online."""
        if self.timeline.now < self.lease:
            self.timeline.after(self.lease - self.timeline.now, self.start_node)
            return
        self.running, self.starts = True, self.starts + 1
        self.changed()

    def changed(self) -> None:
        """Something about the way to the SuperLink is other than before."""
        if not self.connected:
            self.lease = max(self.lease, self.timeline.now + LEASE)
        self.wake()

    def arrive(self, letter: Letter) -> None:
        """A message for this node."""
        if self.pulls and letter.ask == "withdraw":
            self.timeline.after(self.rng.uniform(0.1, 1.0), lambda: self.interrupt(letter))
            return
        self.inbox.append(letter)
        self.wake()

    def interrupt(self, letter: Letter) -> None:
        """Hand a withdrawal to the worker, which trains that turn, or not."""
        turn = self.busy
        if letter.session != self.link.session or not self.running or not self.registered:
            return
        if not self.connected or self.desk is None or self.stopped:
            self.timeline.after(1.0, lambda: self.interrupt(letter))
        elif turn is not None and (turn.ask, turn.round) == ("turn", letter.round):
            self.withdrawal = letter
            self.finish(turn)
        else:
            self.link.answer(self, letter, self.hand(letter, self.desk.answer))

    def wake(self) -> None:
        """Look for a message soon."""
        if self.busy is None and self.inbox and self.connected:
            self.timeline.after(self.rng.uniform(0.2, 3.0), self.pull)

    def pull(self) -> None:
        """Fetch the next message and hand it to the worker."""
        if self.busy is not None or not self.inbox or not self.connected:
            return
        self.busy = letter = self.inbox.pop(0)
        seconds = 1.0 + (self.rng.uniform(1.0, 4.0) * self.pace if letter.ask == "turn" else 0.0)
        self.timeline.after(seconds, lambda: self.finish(letter))

    def finish(self, letter: Letter) -> None:
        """The worker is done, unless something befell it."""
        if letter is not self.busy:
            return
        if self.desk is None or self.stopped:
            self.timeline.after(1.0, lambda: self.finish(letter))
            return
        try:
            reply = self.work(letter, self.desk)
        except Killed:
            self.kill_worker()
            self.machine.thaw()
            self.timeline.after(self.rng.uniform(1.0, 8.0), self.start_worker)
            self.timeline.after(1.0, lambda: self.finish(letter))
            return
        self.push(letter, reply)

    def work(self, letter: Letter, desk: Desk) -> Message:
        """The desk's answer to a turn, in which a withdrawal may come."""
        withdrawal, self.withdrawal = self.withdrawal, None
        if withdrawal is None:
            return self.hand(letter, desk.answer)

        def look() -> None:
            desk.wanted.look = lambda: None
            self.link.answer(self, withdrawal, self.hand(withdrawal, desk.wanted.answer))

        desk.wanted.look = look
        try:
            return self.hand(letter, desk.answer)
        finally:
            if desk.wanted.look is look:  # nothing was trained: the same answer again, say
                look()

    def hand(self, letter: Letter, answer: Callable[[Parcel], Parcel]) -> Message:
        """The worker's answer, by way of the relay."""
        context = Context(1, self.number, {}, RecordDict(), {"settings": shared_settings(self.config)})
        with self.link.machines.on(self.machine):
            return relay(letter.message, context, lambda parcel, _: self.other_version(answer, parcel))

    def other_version(self, answer: Callable[[Parcel], Parcel], parcel: Parcel) -> Parcel:
        """The desk's answer, or that of a worker of another version."""
        if not self.version:
            return answer(parcel)
        protocol = parcel.facts.get("protocol")
        known = 0 if protocol is None else int(protocol)
        return Parcel({"error": "this site speaks another version", "protocol": known + self.version})

    def push(self, letter: Letter, reply: Message) -> None:
        """Hand the answer over, as soon as the line is there."""
        if letter is not self.busy:
            return
        if not self.connected:
            self.timeline.after(3.0, lambda: self.push(letter, reply))
            return
        self.busy = None
        self.link.answer(self, letter, reply)
        self.wake()


def carried(site: str, ask: str, round: int, parcel: Parcel, bent: bool = False) -> Carried:
    """What is remembered of a parcel."""
    content = b"".join(parcel.payloads)
    return Carried(site, ask, round, len(content), hashlib.sha256(content).hexdigest() if content else "", bent)


def spoilt(parcel: Parcel, rng: random.Random) -> Parcel:
    """The same parcel, one bit of one payload changed."""
    payloads = [bytearray(payload) for payload in parcel.payloads]
    hit = rng.choice(payloads)
    hit[rng.randrange(len(hit))] ^= 1 << rng.randrange(8)
    return Parcel(parcel.facts, tuple(map(bytes, payloads)))
