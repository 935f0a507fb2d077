"""What an engine brings to the rounds of a run: the sites, and the way to them.

`server.local.LocalSites` trains in this process, `flower.sites.FlowerSites` asks over Flower's messages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fedloom.records.ledger import Row
from fedloom.rounds.checks import UpdateFacts
from fedloom.rounds.decoded import Decoded
from fedloom.rounds.regions import Tree
from fedloom.rounds.stale import Past
from fedloom.server.attendance import Attendance
from fedloom.server.buffer import Buffer
from fedloom.workspace.checkpoint import Snapshot

if TYPE_CHECKING:
    from fedloom.server.loop import Rounds


@dataclass(frozen=True, eq=False, slots=True)
class Summed:
    """What a secure sum has brought: the update that stands for it (`secure.mean_update`), and whose sum it is."""

    update: bytes
    sites: tuple[str, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Updates:
    """What a round's clients sent, by client. seen: what a check saw of them already; least: how many a round needs.

    decoded: where what they sent waits, decoded by that check. diverged: whether there are none because every training
    ended in values that are not finite.
    past: of asynchronous rounds, the older versions that updates rest on; stats: numbers of the round worth recording.
    tree: see `server_turn`.
    summed: of a round with secure aggregation, whose payloads nobody has; skipped: why there is no sum.
    """

    payloads: Mapping[str, bytes]
    seen: Mapping[str, UpdateFacts] = field(default_factory=dict)
    least: int = 1
    diverged: bool = False
    decoded: Decoded | None = None
    past: Mapping[str, Past] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)
    tree: Tree | None = None
    summed: Summed | None = None
    skipped: str = ""

    @property
    def clients(self) -> Collection[str]:
        """Whose updates these are."""
        return self.payloads.keys() if self.summed is None else self.summed.sites


class Sites(Protocol):
    """The clients of a run, and the way to them. Iterating gives their names. together: whether they train at once."""

    together: bool

    def __iter__(self) -> Iterator[str]: ...

    def collect(self, rounds: Rounds, present: Attendance) -> Updates:
        """Ask who is present; the updates that came. Each goes through `Rounds.take_update`."""

    def fill(self, rounds: Rounds, buffer: Buffer) -> bool:
        """Have turns begun and ended until the buffer is full, or nobody is left who could fill it in this round.

        Whether every training of the round diverged. Each update goes through `Rounds.take_update`.
        """

    def advance(self, rounds: Rounds, payload: bytes, counted: Collection[str]) -> None:
        """The server has moved on by this broadcast, or to this full state; `counted` are those who were averaged."""

    def deliver(self, rounds: Rounds) -> None:
        """After the last round: everybody who can be reached receives the result, who has not had it.

        Also called where a run goes on whose rounds are over.
        """

    def keep_sent(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Of ledger rows after the newest checkpoint, which a run that goes on plays anew, those that are to stay: the
        payloads that have really travelled.
        """

    def remember(self, snapshot: Snapshot) -> Snapshot:
        """The checkpoint, with what is known of each client in it."""

    def restore(self, rounds: Rounds, snapshot: Snapshot) -> None:
        """Take up what a checkpoint knows of each client."""
