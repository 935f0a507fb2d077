"""What dense FedIT would have sent in a run's place: the yardstick of its bytes.

FedIT sends both factors of every module as floats of 32 bits, both ways, at one rank for all clients. So its bytes
follow from shapes and from who was there; nothing has to be trained. It is played on the run's own events: the same
clients are brought in step by what they missed, or by the whole state where that is smaller; the same clients answer;
the same clients receive the result. It never consolidates. Four bytes a value are counted, and no header.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedloom.records.ledger import Aggregation, ModuleGroup, Row, RunRow, Training, Transfer

FP32 = 4
"""Bytes of a value."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Bytes of the dense run: up, down in turns, and down when the rounds were over. ranks: the lowest and the largest.

    ranks is None for a ledger that does not tell its modules: that of the server's adapter was taken.
    """

    up: int
    down: int
    delivery: int
    ranks: tuple[int, int] | None

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.up + self.down + self.delivery

    def times(self, rank: int) -> Baseline:
        """Of one at rank 1: the same at another rank."""
        return Baseline(self.up * rank, self.down * rank, self.delivery * rank, (rank, rank))

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"dense fp32 FedIT of {self.rank}"

    @property
    def rank(self) -> str:
        """The rank, in words."""
        if self.ranks is None:
            return "the largest rank"
        low, high = self.ranks
        return f"rank {high}" if low == high else f"ranks {low} to {high}"


class DenseRun:
    """A dense run in progress, in bytes. `steps` counts the broadcasts that the server has made."""

    def __init__(self, modules: Sequence[ModuleGroup]) -> None:
        self._groups = [(FP32 * group.width * group.rank, frozenset(group.clients)) for group in modules]
        self._whole = sum(size for size, _ in self._groups)
        self._broadcast = [0]
        """Bytes of all broadcasts up to each step."""
        self._updates: dict[str, int] = {}
        self.up = self.down = self.delivery = 0

    @property
    def steps(self) -> int:
        """Broadcasts made so far: the version of the server's state, where nothing is consolidated."""
        return len(self._broadcast) - 1

    def send(self, client: str) -> None:
        """A client sends what it trains."""
        if client not in self._updates:
            self._updates[client] = self._size([client])
        self.up += self._updates[client]

    def advance(self, clients: Collection[str]) -> None:
        """The server averages these clients' updates. What none of them trains is not in its broadcast."""
        self._broadcast.append(self._broadcast[-1] + self._size(clients))

    def fetch(self, steps: int | None, *, delivery: bool = False) -> None:
        """A client that knows so many steps is brought up to date; None for one whose state is not the run's."""
        known = steps is not None and steps <= self.steps
        missed = self._broadcast[-1] - self._broadcast[steps or 0] if known else self._whole
        size = min(missed, self._whole)
        if delivery:
            self.delivery += size
        else:
            self.down += size

    def result(self, ranks: tuple[int, int] | None) -> Baseline:
        """What was sent so far; `ranks` as in `Baseline`."""
        return Baseline(self.up, self.down, self.delivery, ranks)

    def _size(self, clients: Collection[str]) -> int:
        """Bytes of what some of these clients train."""
        return sum(size for size, held in self._groups if clients and (not held or not held.isdisjoint(clients)))


def play_ledger(rows: Iterable[Row], run: RunRow, rank: int | None = None) -> Baseline:
    """The dense run with the attendance that a ledger tells, at a rank (None: the largest of each module)."""
    modules = modules_of(run, rank)
    play, trained, known = DenseRun(modules), set[str](), dict[str, int]()
    reached, over = {0: 0}, 0
    before: Row = run
    for row in rows:
        if isinstance(row, Transfer) and row.is_talk:
            continue
        if isinstance(row, Transfer) and row.direction == "up":
            play.send(row.client)
        elif isinstance(row, Transfer) and not _goes_on(row, before):
            steps = known.get(row.client, 0) if row.version is None else reached.get(row.version)
            # Something came down, so the client lacked something, whatever an older ledger lets one count.
            late = None if row.version is None and steps == play.steps else steps
            play.fetch(late, delivery=is_delivery(row, run.num_rounds, over))
            known[row.client] = play.steps
        elif isinstance(row, Training):
            trained.add(row.client)
        elif isinstance(row, Aggregation):
            play.advance(trained or run.clients)
            reached[play.steps if row.version is None else row.version] = play.steps
            over = row.round
            trained.clear()
        before = row
    return play.result(ranks_of(modules) if run.modules else None)


def _goes_on(row: Transfer, before: Row) -> bool:
    """Whether a payload that goes down is one more of those that bring the same client in step."""
    if not isinstance(before, Transfer) or (before.client, before.round, before.direction) != (
        row.client,
        row.round,
        "down",
    ):
        return False
    return row.version is None or (row.kind == before.kind == "change" and row.version == (before.version or 0) + 1)


def is_delivery(row: Transfer, last: int, over: int) -> bool:
    """Whether a payload is the result, sent when all rounds were over.

    last: the run's last round; over: the last round that was averaged before this row. An older ledger does not say
    what is the delivery: it comes down when the last round's average is made.
    """
    dateless = row.direction == "down" and row.version is None and not row.is_talk
    return row.delivery or (dateless and row.round == over == last)


def delivered_bytes(rows: Iterable[Row], run: RunRow) -> dict[str, int]:
    """Client → bytes of the result that it was sent when all rounds were over. They are among those that went down."""
    found, over = dict[str, int](), 0
    for row in rows:
        if isinstance(row, Aggregation):
            over = row.round
        elif isinstance(row, Transfer) and is_delivery(row, run.num_rounds, over):
            found[row.client] = found.get(row.client, 0) + row.bytes
    return found


def modules_of(run: RunRow, rank: int | None = None) -> Sequence[ModuleGroup]:
    """A run's modules, all at one rank if it is given. An older ledger knows their values only."""
    if not run.modules:
        return [ModuleGroup(run.adapter_values, 1)]
    return [replace(group, rank=rank) for group in run.modules] if rank else run.modules


def ranks_of(modules: Sequence[ModuleGroup]) -> tuple[int, int]:
    """The lowest and the largest rank."""
    ranks = [group.rank for group in modules]
    return min(ranks), max(ranks)


def group_modules(
    placed: Mapping[str, tuple[tuple[int, int], int]], clients: Mapping[str, Collection[str]]
) -> tuple[ModuleGroup, ...]:
    """Modules in groups of the same rank and the same clients.

    placed: module → its shape (m, n) and the largest rank. clients: client → the modules that it trains.
    """
    widths: dict[tuple[int, tuple[str, ...]], int] = {}
    everybody = [name for name, held in clients.items() if len(held) == len(placed)]
    others = {name: frozenset(held) for name, held in clients.items() if len(held) != len(placed)}
    for module, (shape, rank) in placed.items():
        some = tuple(sorted([*everybody, *(name for name, held in others.items() if module in held)])) if others else ()
        key = rank, () if len(some) == len(clients) else some
        widths[key] = widths.get(key, 0) + sum(shape)
    return tuple(ModuleGroup(width, rank, held) for (rank, held), width in widths.items())


def play_rounds(
    modules: Sequence[ModuleGroup], clients: Collection[str], rounds: Iterable[tuple[Collection[str], Collection[str]]]
) -> Baseline:
    """The dense run of rounds that are still to come, each as (clients that are asked, those of them that answer)."""
    play, known = DenseRun(modules), dict.fromkeys(clients, 0)
    for asked, answered in rounds:
        for client in asked:
            play.fetch(known[client])
            known[client] = play.steps
        for client in answered:
            play.send(client)
        if answered:
            play.advance(answered)
    for steps in known.values():
        play.fetch(steps, delivery=True)
    return play.result(ranks_of(modules))
