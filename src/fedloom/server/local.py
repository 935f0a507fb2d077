"""The in-process engine: one resident base model, adapters swapped in and out, every payload through the wire."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedloom.compress.seeds import derived_seed

from fedloom.compress.budget import Budget
from fedloom.errors import NumericError
from fedloom.methods.method import State
from fedloom.model.partition import save_manifest
from fedloom.records.config import Config
from fedloom.records.events import Observer, RunFacts, RunSummary, Silent
from fedloom.records.ledger import Aggregation, Evaluation, Training
from fedloom.rounds.catchup import Archive
from fedloom.rounds.turns import ClientTurn, ServerTurn, client_turn, full_state, server_turn, start
from fedloom.server.roster import Held, Roster
from fedloom.wire import describe
from fedloom.workspace.assemble import Setup, prepare
from fedloom.workspace.checkpoint import Snapshot
from fedloom.workspace.export import finish
from fedloom.workspace.folder import RunFolder


def run(config: Config, out: Path, *, resume: bool = False, observer: Observer | None = None) -> RunSummary:
    """Simulate the whole federation that `config` describes, leaving its results in the folder `out`.

    Raises ConfigError, DataError or ModelError for what the user can mend, CheckpointError where `out` holds
    another run or, with `resume`, nothing to go on from.
    """
    with RunFolder.open(out, config, resume=resume) as folder:
        simulation = Simulation(prepare(config), folder, observer or Silent())
        return simulation.play(resume)


@dataclass(frozen=True, slots=True)
class Attendance:
    """Who is asked in a round, and who of them vanishes after the download."""

    asked: tuple[str, ...]
    vanished: frozenset[str]


def attendance(config: Config, clients: Mapping[str, object], round: int) -> Attendance:
    """The seeded draw of one round: `fraction_train` of the clients, at least one."""
    federation = config.federation
    draw = random.Random(derived_seed(federation.seed, "attendance", round))
    asked = tuple(sorted(draw.sample(sorted(clients), federation.asked(len(clients)))))
    return Attendance(asked, frozenset(name for name in asked if draw.random() < federation.drop_out))


def choice(payload: bytes, budget: Budget) -> str:
    """What a budget was spent on, in words."""
    tensors = describe(payload).tensors
    share = sum(t.values for t in tensors) / max(sum(math.prod(t.shape) for t in tensors), 1)
    kinds = ", ".join(sorted({t.coding for t in tensors}))
    return f"wire.budget of {budget}: {100 * share:.2f} % of the values as {kinds} in {len(payload)} bytes"


class Simulation:
    """A run in progress: the participants' states, and where it is recorded."""

    def __init__(self, setup: Setup, folder: RunFolder, observer: Observer) -> None:
        self.setup = setup
        self.folder = folder
        self.observer = observer
        self.server: State = start(setup.job, setup.initial)
        self.roster = Roster(setup.job, setup.initial, {name: site.ranks for name, site in setup.sites.items()})
        self.clients: Held = self.roster
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
                clients=tuple(self.clients),
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
                self.deliver_last()
            self.save()
        summary = finish(self.setup, self.folder, self.server, time.perf_counter() - began)
        self.observer.run_finished(summary)
        return summary

    def begin(self) -> None:
        """Say what the run is, and how good the model is before it."""
        config, began = self.setup.config, time.perf_counter()
        self.folder.ledger.append(self.setup.described())
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
        present = attendance(self.setup.config, self.clients, round)
        payloads = self.collect(round, present)
        if payloads:
            self.aggregate(payloads, round)
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

    def collect(self, round: int, present: Attendance) -> dict[str, bytes]:
        """The updates of one round, by client."""
        turns = {client: self.play_client(client, round, client in present.vanished) for client in present.asked}
        return {client: payload for client, payload in turns.items() if payload is not None}

    def play_client(self, client: str, round: int, vanishes: bool) -> bytes | None:
        """One client's turn; None where it does not answer."""
        self.observer.client_started(round, client)
        received = self.download(client, round)
        if vanishes:
            self.folder.ledger.note(round, f"client {client} dropped out after the download")
            return None
        try:
            turn = self.turn(client, round)
        except NumericError as error:
            self.folder.ledger.note(round, str(error))
            return None
        self.clients.hold(client, turn.state)
        trained = turn.trained
        self.record(Training(round, client, trained.loss, trained.steps, trained.num_examples, trained.seconds))
        self.folder.transfer(round, client, "up", turn.payload)
        if round == 1 and self.setup.job.budget:
            self.folder.ledger.note(round, f"client {client}: {choice(turn.payload, self.setup.job.budget)}")
        self.observer.client_finished(round, client, turn.trained.loss, len(turn.payload), received)
        return turn.payload

    def record(self, row: Training) -> None:
        """What a client says of its training; noted where its examples, which it counts for, have changed."""
        before = self.folder.ledger.examples.get(row.client, row.examples)
        if before != row.examples:
            self.folder.ledger.note(
                row.round, f"client {row.client} says {row.examples:,} examples, and said {before:,} the last time"
            )
        self.folder.ledger.append(row)

    def turn(self, client: str, round: int) -> ClientTurn:
        """Training and what is sent of it. Raises NumericError where it diverged."""
        return client_turn(self.setup.job, client, self.clients[client], [], self.setup.train(client), round)

    def download(self, client: str, round: int) -> int:
        """Bring the client in step with the server; returns the bytes that it received."""
        payloads = self.missed(client, round)
        self.roster.receive(client, payloads)
        return sum(map(len, payloads))

    def missed(self, client: str, round: int) -> list[bytes]:
        """What brings the client in step with the server, recorded as sent."""
        version, ranks = self.clients[client].version, self.setup.sites[client].ranks
        payloads = self.archive.needed(self.setup.job, self.server, version, ranks, round)
        for payload in payloads:
            self.folder.transfer(round, client, "down", payload)
        return payloads

    def combine(self, payloads: Mapping[str, bytes], round: int) -> ServerTurn:
        """The server's turn."""
        return server_turn(self.setup.job, self.server, payloads, round)

    def aggregate(self, payloads: Mapping[str, bytes], round: int) -> ServerTurn:
        """The server's turn, recorded."""
        began = time.perf_counter()
        turn = self.combine(payloads, round)
        for client, reason in turn.refused.items():
            self.folder.ledger.note(round, f"client {client} refused: {reason}")
        for text in turn.notes:
            self.folder.ledger.note(round, text)
        self.folder.ledger.append(Aggregation(round, turn.stats, time.perf_counter() - began))
        self.archive.add(self.server.version, turn.payload, limit=4 * turn.state.total.numel())
        led = turn.state.version == self.server.version + 1  # else the server has consolidated as well
        self.server = turn.state
        self.clients.follow(turn.payload if led else full_state(self.setup.job, self.server, round))
        return turn

    def deliver_last(self) -> None:
        """After the last round everybody receives the result, whoever took part in it."""
        for client in self.clients:
            self.download(client, self.round)

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
            Snapshot(self.round, self.server, self.clients, self.archive.payloads, rows, self.setup.fingerprint)
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a checkpoint."""
        self.round, self.server = snapshot.round, snapshot.server
        if self.server.version:
            self.clients.follow(full_state(self.setup.job, self.server, self.round))
        for client, state in snapshot.clients.items():
            self.clients.hold(client, state)
        self.archive = Archive(snapshot.archive)
