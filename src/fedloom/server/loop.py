"""The rounds of a run, wherever its sites are.

    Rounds.play ─ each round ─→ sites.collect ─→ server_turn ─→ sites.advance ─→ evaluate ─→ checkpoint
                                 └ last round ─→ sites.deliver

`Sites` is what an engine brings: `server.local.LocalSites` trains in this process, `flower.sites.FlowerSites` asks over
Flower's messages. All else of a run is here, once.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fedloom.compress.budget import Budget
from fedloom.compress.seeds import derived_seed
from fedloom.methods.method import State
from fedloom.model.partition import save_manifest
from fedloom.records.config import Config
from fedloom.records.events import Observer, RunFacts, RunSummary
from fedloom.records.ledger import Aggregation, Evaluation, Training
from fedloom.rounds.catchup import Archive
from fedloom.rounds.checks import UpdateFacts
from fedloom.rounds.turns import full_state, server_turn, start
from fedloom.wire import describe
from fedloom.workspace.assemble import Setup
from fedloom.workspace.checkpoint import Snapshot
from fedloom.workspace.export import finish_run
from fedloom.workspace.folder import RunFolder


@dataclass(frozen=True, slots=True)
class Attendance:
    """Who is asked in a round, and who of them vanishes after the download."""

    asked: tuple[str, ...]
    vanished: frozenset[str]

    @property
    def answering(self) -> tuple[str, ...]:
        """Who does not vanish."""
        return tuple(client for client in self.asked if client not in self.vanished)


def draw_attendance(config: Config, clients: Collection[str], round: int) -> Attendance:
    """The seeded draw of one round: `fraction_train` of the clients, at least one."""
    federation = config.federation
    draw = random.Random(derived_seed(federation.seed, "attendance", round))
    asked = tuple(sorted(draw.sample(sorted(clients), federation.clients_per_round(len(clients)))))
    return Attendance(asked, frozenset(name for name in asked if draw.random() < federation.drop_out))


def draw_rounds(config: Config, clients: Collection[str]) -> Iterator[Attendance]:
    """The seeded draws of all rounds, as a run will make them."""
    return (draw_attendance(config, clients, round) for round in range(1, config.federation.num_rounds + 1))


@dataclass(frozen=True, eq=False, slots=True)
class Updates:
    """What a round's clients sent, by client. seen: what a check saw of them already; least: how many a round needs."""

    payloads: Mapping[str, bytes]
    seen: Mapping[str, UpdateFacts] = field(default_factory=dict)
    least: int = 1


class Sites(Protocol):
    """The clients of a run, and the way to them. Iterating gives their names."""

    def __iter__(self) -> Iterator[str]: ...

    def collect(self, rounds: Rounds, present: Attendance) -> Updates:
        """Ask who is present; the updates that came. Each goes through `Rounds.take_update`."""

    def advance(self, rounds: Rounds, payload: bytes, counted: Collection[str]) -> None:
        """The server has moved on by this broadcast, or to this full state; `counted` are those who were averaged."""

    def deliver(self, rounds: Rounds) -> None:
        """After the last round: everybody who can be reached receives the result."""

    def remember(self, snapshot: Snapshot) -> Snapshot:
        """The checkpoint, with what is known of each client in it."""

    def restore(self, rounds: Rounds, snapshot: Snapshot) -> None:
        """Take up what a checkpoint knows of each client."""


class Rounds:
    """A run in progress: the server's state, the broadcasts that a client may have missed, and where it is recorded."""

    def __init__(self, setup: Setup, folder: RunFolder, observer: Observer, sites: Sites) -> None:
        self.setup = setup
        self.folder = folder
        self.observer = observer
        self.sites = sites
        self.server: State = start(setup.job, setup.initial)
        self.archive = Archive()
        self.round = 0

    def play(self, resume: bool) -> RunSummary:
        """All rounds that are left, then the exports and the report."""
        snapshot = self.folder.restore(self.setup.fingerprint) if resume else None
        if snapshot:
            self.restore(snapshot)
        config, began = self.setup.config, time.perf_counter()
        self.observer.run_started(
            RunFacts(
                method=self.setup.job.method.name,
                model=config.model.path,
                clients=tuple(self.sites),
                num_rounds=config.federation.num_rounds,
                adapter_values=self.setup.initial.numel(),
                out=self.folder.path,
                first_round=self.round + 1,
                warnings=tuple(self.setup.warnings()),
            )
        )
        if snapshot is None:
            self.begin()
        while self.round < config.federation.num_rounds:
            self.round += 1
            self.play_round(self.round)
            if self.round == config.federation.num_rounds:
                self.sites.deliver(self)
            self.save()
        summary = finish_run(self.setup, self.folder, self.server, time.perf_counter() - began)
        self.observer.run_finished(summary)
        return summary

    def begin(self) -> None:
        """Say what the run is, and how good the model is before it."""
        config, began = self.setup.config, time.perf_counter()
        self.folder.ledger.append(self.setup.describe())
        for text in self.setup.warnings():
            self.folder.ledger.note(0, text)
        if self.setup.manifest:
            save_manifest(self.folder.path / "split.json", self.setup.manifest)
        scores = self.evaluate(0)
        self.observer.round_finished(0, config.federation.num_rounds, scores, 0, 0, time.perf_counter() - began)
        self.save()

    def play_round(self, round: int) -> None:
        """Download, train, upload, aggregate, evaluate."""
        began, ledger = time.perf_counter(), self.folder.ledger
        bytes_before = ledger.bytes_up, ledger.bytes_down
        updates = self.sites.collect(self, draw_attendance(self.setup.config, tuple(self.sites), round))
        if updates.payloads:
            self.aggregate(updates, round)
        else:
            ledger.note(round, "nobody answered: the round is skipped")
        every = self.setup.config.federation.eval_every
        last = round == self.setup.config.federation.num_rounds
        scores = self.evaluate(round) if last or (every and round % every == 0) else None
        self.observer.round_finished(
            round,
            self.setup.config.federation.num_rounds,
            scores,
            ledger.bytes_up - bytes_before[0],
            ledger.bytes_down - bytes_before[1],
            time.perf_counter() - began,
        )

    def take_update(self, trained: Training, payload: bytes, received: int) -> None:
        """Record a client's turn: what its training said, what it sent, and the bytes that it had been sent."""
        ledger, budget = self.folder.ledger, self.setup.job.budget
        before = ledger.examples.get(trained.client, trained.examples)
        if before != trained.examples:  # it is what the client counts for
            ledger.note(
                trained.round,
                f"client {trained.client} says {trained.examples:,} examples, and said {before:,} the last time",
            )
        ledger.append(trained)
        self.folder.transfer(trained.round, trained.client, "up", payload)
        if trained.round == 1 and budget:
            ledger.note(trained.round, f"client {trained.client}: {describe_choice(payload, budget)}")
        self.observer.client_finished(trained.round, trained.client, trained.loss, len(payload), received)

    def send_missed(self, client: str, version: int, *, delivery: bool = False) -> list[bytes]:
        """What brings a client at `version` in step with the server, recorded as sent; `delivery`: after all rounds."""
        ranks = self.setup.sites[client].ranks
        payloads = self.archive.payloads_for(self.setup.job, self.server, version, ranks, self.round)
        for held, payload in enumerate(payloads, start=version):
            self.folder.transfer(self.round, client, "down", payload, version=held, delivery=delivery)
        return payloads

    def aggregate(self, updates: Updates, round: int) -> None:
        """The server's turn, recorded."""
        began, payloads = time.perf_counter(), updates.payloads
        turn = server_turn(self.setup.job, self.server, payloads, round, seen=updates.seen, least=updates.least)
        for client, reason in turn.refused.items():
            self.folder.ledger.note(round, f"client {client} refused: {reason}")
        for text in turn.notes:
            self.folder.ledger.note(round, text)
        self.folder.ledger.append(Aggregation(round, turn.stats, time.perf_counter() - began, turn.state.version))
        # Four bytes a value: what a full state of fp32 takes. Broadcasts beyond that are dearer than the state itself.
        self.archive.add(self.server.version, turn.payload, limit=4 * turn.state.total.numel())
        led = turn.state.version == self.server.version + 1  # else the server has consolidated as well
        self.server = turn.state
        self.sites.advance(self, turn.payload if led else self.full_state(), payloads.keys() - turn.refused.keys())

    def full_state(self) -> bytes:
        """The payload that brings anybody to the server's state."""
        return full_state(self.setup.job, self.server, self.round)

    def evaluate(self, round: int) -> dict[str, float]:
        """Held-out exact match of the server's model, by domain, recorded."""
        scores = self.setup.evaluate(self.server)
        for domain, score in scores.items():
            self.folder.ledger.append(Evaluation(round, domain, score.exact_match, score.loss))
        return {domain: score.exact_match for domain, score in scores.items()}

    def save(self) -> None:
        """Ledger first, then the checkpoint that counts its rows: a crash between the two loses nothing."""
        rows = self.folder.ledger.sync()
        self.folder.save(
            self.sites.remember(
                Snapshot(
                    round=self.round,
                    server=self.server,
                    archive=self.archive.payloads,
                    ledger_rows=rows,
                    fingerprint=self.setup.fingerprint,
                )
            )
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a checkpoint."""
        self.round, self.server = snapshot.round, snapshot.server
        self.archive = Archive(snapshot.archive)
        self.sites.restore(self, snapshot)


def describe_choice(payload: bytes, budget: Budget) -> str:
    """What a byte budget was spent on, in words."""
    tensors = describe(payload).tensors
    share = sum(t.values for t in tensors) / max(sum(math.prod(t.shape) for t in tensors), 1)
    kinds = ", ".join(sorted({t.coding for t in tensors}))
    return f"wire.budget of {budget}: {100 * share:.2f} % of the values as {kinds} in {len(payload)} bytes"
