"""The faults: what each does, how long, and which of them end a session of the server.

A fault is armed when the first turn of its round is posted, strikes at a random moment of the round, and ends by
itself, as somebody who looks after the machines would end it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from benchmarks.soak.superlink import Link, SimNode

FOREVER = float("inf")


@dataclass(eq=False)
class Strike:
    """One fault of one round. site: whom it befalls, "" for the server. ends: when it is over, infinite until then."""

    round: int
    fault: str
    site: str
    begins: float
    ends: float = FOREVER
    told: str = ""


class Hand:
    """What a fault may reach: the link, the node that it befalls, and the strike to say when it is over."""

    def __init__(self, link: Link, node: SimNode, rng: random.Random, strike: Strike) -> None:
        self.link, self.node, self.rng, self.strike = link, node, rng, strike
        self.timeline, self.server = link.machines.timeline, link.machines.server

    def later(self, seconds: float, mend: Callable[[], None]) -> None:
        """Mend it after so long; the fault is over then."""

        def over() -> None:
            mend()
            self.done()

        self.timeline.after(seconds, over)

    def done(self) -> None:
        """The fault is over."""
        self.strike.ends = self.timeline.now


def kill_worker(hand: Hand) -> str:
    """kill -9 of a worker: at one of its next steps on disk, or at once where it is training."""
    if hand.rng.random() < 0.5:
        hand.node.machine.kill_in = hand.rng.randrange(14)

        def spare() -> None:
            hand.node.machine.kill_in = None

        hand.later(25.0, spare)
        return "at a step on disk"
    hand.node.kill_worker()
    hand.later(hand.rng.uniform(2.0, 12.0), hand.node.start_worker)
    return "while it waits or trains"


def kill_node(hand: Hand) -> str:
    """kill -9 of a node; its worker lives on."""
    hand.node.kill_node()
    _return_node(hand)
    return "comes back when Flower lets it"


def lose_power(hand: Hand) -> str:
    """kill -9 of node and worker."""
    hand.node.kill_node()
    hand.node.kill_worker()
    hand.timeline.after(5.0, hand.node.start_worker)
    _return_node(hand)
    return "node and worker"


def _return_node(hand: Hand) -> None:
    def back() -> None:
        hand.node.start_node()
        if hand.node.running:
            hand.done()
        else:
            hand.timeline.after(1.0, lambda: hand.done() if hand.node.running else back())

    hand.timeline.after(hand.rng.uniform(3.0, 40.0), back)


def kill_server(hand: Hand) -> str:
    """kill -9 of the server app at any step; it is started again with --resume."""
    hand.server.kill_in = steps = hand.rng.randrange(60)
    hand.done()
    return f"{steps} steps later"


def kill_superlink(hand: Hand) -> str:
    """kill -9 of the SuperLink: the server app ends with it, and no node reaches it for a while."""
    hand.link.away = True
    for node in hand.link.nodes.values():
        node.changed()

    def back() -> None:
        hand.link.away = False
        for node in hand.link.nodes.values():
            node.changed()

    hand.later(hand.rng.uniform(3.0, 20.0), back)
    hand.server.kill_in = 0
    return "and the server app"


def stop_worker(hand: Hand) -> str:
    """SIGSTOP of a worker until after the deadline, then SIGCONT."""
    hand.node.stopped = True

    def go_on() -> None:
        hand.node.stopped = False

    seconds = hand.rng.uniform(1.2, 2.0) * hand.node.config.flower.deadline
    hand.later(seconds, go_on)
    return f"for {seconds:.0f} s"


def slow_site(hand: Hand) -> str:
    """Training takes several times the deadline."""
    hand.node.pace = pace = hand.rng.uniform(8.0, 30.0)

    def quicken() -> None:
        hand.node.pace = 1.0

    hand.later(hand.rng.uniform(20.0, 80.0), quicken)
    return f"{pace:.0f} times slower"


def fill_site(hand: Hand) -> str:
    """A full disk at a site."""
    hand.node.machine.room = room = hand.rng.randrange(0, 6000)

    def free() -> None:
        hand.node.machine.room = None

    hand.later(hand.rng.uniform(5.0, 45.0), free)
    return f"no file grows over {room} bytes"


def fill_server(hand: Hand) -> str:
    """A full disk at the server, until somebody frees it."""
    hand.server.room = room = hand.rng.randrange(0, 60000)

    def free() -> None:
        hand.server.room = None

    hand.later(hand.rng.uniform(5.0, 45.0), free)
    return f"no file grows over {room} bytes"


def cut_line(hand: Hand) -> str:
    """A site's line is cut."""
    hand.node.line = False
    hand.node.changed()

    def mend() -> None:
        hand.node.line = True
        hand.node.changed()

    seconds = hand.rng.uniform(3.0, 90.0)
    hand.later(seconds, mend)
    return f"for {seconds:.0f} s"


def expire_certificate(hand: Hand) -> str:
    """The certificate is over: the node is refused, ends, and is started anew with a new one."""
    hand.node.certified = False
    hand.node.kill_node()
    hand.node.changed()

    def renew() -> None:
        hand.node.certified = True
        hand.node.start_node()

    hand.later(LEASE_AND_MORE, renew)
    return "renewed after a while"


def revoke_key(hand: Hand) -> str:
    """The node is unregistered; it comes back with a new key, as another node of the same name."""
    node, link = hand.node, hand.link
    node.registered = False
    node.lose()
    for letter in node.inbox:
        node.lose_letter(letter)
    node.inbox.clear()

    def register() -> None:
        link.nodes.pop(node.number)
        node.number = max(link.nodes, default=100) + 1000
        link.nodes[node.number] = node
        node.registered, node.starts = True, node.starts + 1
        node.changed()

    hand.later(hand.rng.uniform(10.0, 50.0), register)
    return "comes back with a new key"


def move_clock(hand: Hand) -> str:
    """A site's clock is set."""
    hours = hand.rng.choice((-30, -1, 1, 30, 24 * 400))
    hand.node.machine.skew = timedelta(hours=hours)

    def right() -> None:
        hand.node.machine.skew = timedelta()

    hand.later(hand.rng.uniform(5.0, 60.0), right)
    return f"by {hours:+d} hours"


def wrong_version(hand: Hand) -> str:
    """A site's worker is of another version for a while."""
    hand.node.version = hand.rng.choice((-1, 1))

    def back() -> None:
        hand.node.version = 0

    hand.later(hand.rng.uniform(8.0, 40.0), back)
    return f"{hand.node.version:+d}"


def late_reply(hand: Hand) -> str:
    """The answer is under way for longer than the deadline."""
    seconds = hand.rng.uniform(1.1, 2.0) * hand.node.config.flower.deadline
    hand.link.hold[hand.node.site.name] = seconds

    def stop() -> None:
        hand.link.hold.pop(hand.node.site.name, None)

    hand.later(seconds + 10.0, stop)
    return f"by {seconds:.0f} s"


def double_reply(hand: Hand) -> str:
    """The answer comes twice."""
    hand.link.double.add(hand.node.site.name)
    hand.later(10.0, lambda: hand.link.double.discard(hand.node.site.name))
    return "half a second apart"


def spoil_update(hand: Hand) -> str:
    """A bit of an update changes on the way."""
    hand.link.spoil_up.add(hand.node.site.name)
    hand.later(10.0, lambda: hand.link.spoil_up.discard(hand.node.site.name))
    return "one bit"


def spoil_broadcast(hand: Hand) -> str:
    """A bit of what a site is sent changes on the way."""
    hand.link.spoil_down.add(hand.node.site.name)
    hand.later(60.0, lambda: hand.link.spoil_down.discard(hand.node.site.name))
    return "one bit"


LEASE_AND_MORE = 50.0
FAULTS: Mapping[str, Callable[[Hand], str]] = {
    "kill -9 of a worker": kill_worker,
    "kill -9 of a node": kill_node,
    "kill -9 of node and worker": lose_power,
    "kill -9 of the server app": kill_server,
    "kill -9 of the SuperLink": kill_superlink,
    "worker stopped beyond the deadline": stop_worker,
    "slow site": slow_site,
    "full disk at a site": fill_site,
    "full disk at the server": fill_server,
    "line cut": cut_line,
    "certificate expired": expire_certificate,
    "key revoked": revoke_key,
    "clock moved": move_clock,
    "wrong version": wrong_version,
    "late reply": late_reply,
    "duplicate reply": double_reply,
    "update corrupted": spoil_update,
    "broadcast corrupted": spoil_broadcast,
}
SERVERS = {"kill -9 of the server app", "kill -9 of the SuperLink", "full disk at the server"}
"""Those that befall the server and not a site."""
AFTER_SESSION = {"kill -9 of the server app": 5.0, "kill -9 of the SuperLink": 15.0, "full disk at the server": 30.0}
"""Seconds until somebody has the server going again."""
