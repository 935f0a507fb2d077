"""The rounds of a run, wherever its sites are.

    Rounds.play ─ each round ─→ sites.collect ─→ server_turn ─→ sites.advance ─→ evaluate ─→ checkpoint
                                 └ last round ─→ sites.deliver

With `federation.mode = "buffered"` it is `sites.fill` that brings a round's updates: those with which `buffer` is full.

`Sites` is what an engine brings (`server.engine`). All else of a run is here, once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from fedloom.errors import CheckpointError, RoundError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import State
from fedloom.model.partition import save_manifest
from fedloom.model.scorer import evaluation_row
from fedloom.records.events import Observer, RunFacts, RunSummary
from fedloom.records.ledger import About, Evaluation, Training, read_rows
from fedloom.records.session import Answer
from fedloom.rounds.catchup import Archive
from fedloom.rounds.memory import give_back
from fedloom.rounds.turns import ServerTurn, full_state, server_turn, start, sum_turn
from fedloom.server.attendance import draw_attendance
from fedloom.server.buffer import Buffer
from fedloom.server.disk import explain_full_disk
from fedloom.server.engine import Sites, Updates
from fedloom.server.session import begin_session, describe_spending, record_end, record_turn
from fedloom.server.spool import Spool
from fedloom.server.stopping import Course, choose_model, validate
from fedloom.trackers.outlets import Destination
from fedloom.trackers.process import Tracking
from fedloom.workspace.assemble import Setup
from fedloom.workspace.checkpoint import Snapshot
from fedloom.workspace.export import finish_run
from fedloom.workspace.folder import RunFolder
from fedloom.workspace.milestones import save_milestone

HOPELESS = 3
"""Rounds after which a run ends in which every training diverged: what the first ones do, the others will do too.

Not the first round: where few clients are asked, it may be one client's data that is at fault.
"""


class Rounds:
    """A run in progress: the server's state, the broadcasts that a client may have missed, and where it is recorded.

    certificates: see `session.Session`. first: the adapter that it begins with, where `setup` has its shapes alone.
    """

    def __init__(
        self,
        setup: Setup,
        folder: RunFolder,
        observer: Observer,
        sites: Sites,
        certificates: Mapping[str, str] | None = None,
        first: LoraState | None = None,
    ) -> None:
        self.setup = setup
        self.certificates = certificates or {}
        self.folder = folder
        self.observer = observer
        self.sites = sites
        self.server: State = start(setup.job, first or setup.initial)
        self.archive = Archive(hold=partial(Spool, folder.path))
        self.round = 0
        self.saved = False  # whether there is a checkpoint
        self.hopeless = False
        self.began = time.perf_counter()
        self.before = 0.0  # seconds of earlier sessions
        self.course = Course(setup.config.federation)
        self.best: State | None = None
        federation = setup.config.federation
        self.buffer = Buffer(setup.job, federation, len(setup.sites)) if federation.mode == "buffered" else None
        output = setup.config.output
        self.tracking = Tracking(folder.path, Destination(output.report_to, output.project, output.run_name or ""))

    @property
    def is_over(self) -> bool:
        """Whether the last round was played, or the run has been stopped."""
        return self.round >= self.setup.config.federation.num_rounds or self.course.is_over

    def play(self, resume: bool) -> RunSummary:
        """All rounds that are left, then the exports and the report.

        A run in which nothing could be averaged leaves no adapter; its summary says why.
        """
        self.began = time.perf_counter()
        if resume:
            snapshot = self.folder.restore(self.setup.fingerprint, self.sites.keep_sent)
            if snapshot:
                self.restore(snapshot)
        try:
            return self.play_rounds()
        except BaseException as error:
            full = explain_full_disk(error, self.folder.path)
            with suppress(OSError, CheckpointError):  # a full disk, say, which is what ends the run
                record_end(self, full or error)
            if full:
                raise full from error
            raise
        finally:
            for text in self.tracking.close():
                self.observer.noted(self.round, text)

    def play_rounds(self) -> RunSummary:
        """Begin or go on, to the end."""
        config, setup = self.setup.config, self.setup
        extension = begin_session(self)
        self.tracking.start()
        self.observer.run_started(
            RunFacts(
                method=setup.job.method.name,
                model=config.model.path,
                clients=tuple(self.sites),
                num_rounds=config.federation.num_rounds,
                adapter_values=setup.initial.numel(),
                out=self.folder.path,
                first_round=self.round + 1,
                warnings=(*self.folder.notes, *extension, *setup.warnings()),
                together=self.sites.together,
            )
        )
        if not self.saved:
            self.begin()
        if self.is_over:  # it was stopped while it delivered its result, or some site was away then
            self.sites.deliver(self)
        while not self.is_over and not self.hopeless:
            self.round += 1
            self.play_round(self.round)
            save_milestone(self.setup, self.folder, self.server, self.round)
            if self.is_over:
                choose_model(self)
                self.record_answers()
                self.sites.deliver(self)
            if not self.hopeless:  # so that a run that goes on comes to the same end
                self.save()
        summary = finish_run(setup, self.folder, self.server, self.round, self.seconds)
        self.observer.run_finished(summary)
        return summary

    @property
    def seconds(self) -> float:
        """What the run has taken so far, in all its sessions."""
        return self.before + time.perf_counter() - self.began

    def note(self, round: int, text: str, about: About = "") -> None:
        """Record something that went otherwise than it should, and show it."""
        self.folder.ledger.note(round, text, about)
        self.observer.noted(round, text)

    def begin(self) -> None:
        """Say how good the model is before the run."""
        config, began = self.setup.config, time.perf_counter()
        for text in self.setup.warnings():
            self.folder.ledger.note(0, text)
        if self.setup.manifest:
            save_manifest(self.folder.path / "split.json", self.setup.manifest)
        scores = self.evaluate(0)
        self.record_answers()
        self.observer.round_finished(0, config.federation.num_rounds, scores, 0, 0, time.perf_counter() - began)
        self.save()

    def play_round(self, round: int) -> None:
        """Download, train, upload, aggregate, evaluate."""
        began, ledger = time.perf_counter(), self.folder.ledger
        bytes_before = ledger.bytes_up, ledger.bytes_down
        updates = self.collect(round)
        if updates.clients:
            self.aggregate(updates, round)
        elif not updates.diverged:
            self.note(round, updates.skipped or "nobody answered: the round is skipped")
        elif self.server.version == 0 and round >= HOPELESS:
            self.note(round, f"every training of {round} rounds diverged: the run is given up", "diverged")
            self.hopeless = True
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

    def collect(self, round: int) -> Updates:
        """The updates of one round: of everybody who is asked or, in asynchronous rounds, what fills the buffer."""
        if self.buffer is None:
            return self.sites.collect(self, draw_attendance(self.setup.config, tuple(self.sites), round))
        for client, reason in self.buffer.drop_stale(self.server).items():
            self.note(round, f"client {client} refused: {reason}", "refused")
        diverged = self.sites.fill(self, self.buffer)
        taken = self.buffer.take()
        return Updates(
            {one.client: one.payload for one in taken},
            {one.client: one.facts for one in taken},
            diverged=diverged and not taken,
            past=self.buffer.past_of(taken, self.server),
            stats=self.buffer.describe(taken, self.server),
        )

    def take_update(self, trained: Training, payload: bytes, received: int) -> None:
        """Record a client's turn: what its training said, what it sent, and the bytes that it had been sent."""
        ledger, budget = self.folder.ledger, self.setup.job.budget
        before = ledger.examples.get(trained.client, trained.examples)
        if before != trained.examples:  # it is what the client counts for
            self.note(
                trained.round,
                f"client {trained.client} says {trained.examples:,} examples, and said {before:,} the last time",
            )
        ledger.append(trained)
        self.folder.transfer(trained.round, trained.client, "up", payload)
        if trained.round == 1 and budget:
            ledger.note(trained.round, f"client {trained.client}: {describe_spending(payload, budget)}")
        self.observer.client_finished(trained.round, trained.client, trained.loss, len(payload), received)

    def send_missed(self, client: str, version: int, *, delivery: bool = False, alone: bool = True) -> list[bytes]:
        """What brings a client at `version` in step, recorded. delivery: after all rounds; alone: see `Archive`."""
        ranks = self.setup.sites[client].ranks
        payloads = self.archive.payloads_for(self.setup.job, self.server, version, ranks, self.round, alone=alone)
        for held, payload in enumerate(payloads, start=version):
            self.folder.transfer(self.round, client, "down", payload, version=held, delivery=delivery)
        return payloads

    def aggregate(self, updates: Updates, round: int) -> None:
        """The server's turn, recorded. Raises RoundError where updates are left, but fewer than the round needs."""
        began = time.perf_counter()
        give_back(max((seen.size for seen in updates.seen.values()), default=0))  # payloads that now lie on disk
        try:
            turn = self.take_turn(updates, round)
        except RoundError as error:
            for client, reason in error.refused.items():
                self.note(round, f"client {client} refused: {reason}", "refused")
            can_skip = error.can_skip or updates.summed is not None
            if not can_skip and (updates.least > 1 or not error.refused):
                raise
            if updates.summed is not None:
                self.note(round, str(error))
            self.note(round, "no update could be averaged: the round is skipped")
            return
        for client, reason in turn.refused.items():
            self.note(round, f"client {client} refused: {reason}", "refused")
        for text in turn.notes:
            self.note(round, text)
        stats = {**turn.stats, **updates.stats}
        record_turn(self.folder.ledger, round, turn, stats, time.perf_counter() - began)
        # Four bytes a value: what a full state of fp32 takes. Broadcasts beyond that are dearer than the state itself.
        limit = 4 * turn.state.numel()
        self.archive.add(self.server.version, turn.payload, limit, self.server.digest)
        led = turn.state.version == self.server.version + 1  # else the server has consolidated as well
        self.server = turn.state
        self.sites.advance(self, turn.payload if led else self.full_state(), set(updates.clients) - turn.refused.keys())
        del turn  # the payload, which is in the archive now
        give_back(4 * self.server.adapter.numel())

    def take_turn(self, updates: Updates, round: int) -> ServerTurn:
        """The server's turn with these updates, or with their sum."""
        if updates.summed is not None:
            return sum_turn(self.setup.job, self.server, updates.summed.update, round)
        return server_turn(
            self.setup.job,
            self.server,
            updates.payloads,
            round,
            seen=updates.seen,
            decoded=updates.decoded,
            least=updates.least,
            past=updates.past,
            tree=updates.tree,
            public=self.setup.public_error if self.setup.job.robust.public else None,
        )

    def full_state(self) -> bytes:
        """The payload that brings anybody to the server's state."""
        return full_state(self.setup.job, self.server, self.round)

    def evaluate(self, round: int) -> dict[str, Evaluation]:
        """What the server's model scores on the held-out examples, by domain, recorded."""
        scores = self.setup.evaluate(self.server)
        found = {domain: evaluation_row(round, domain, score) for domain, score in scores.items()}
        for row in found.values():
            self.folder.ledger.append(row)
        if self.setup.config.federation.validates:
            validate(self, round)
        return found

    def record_answers(self) -> None:
        """What the server's model answers to a few held-out examples, for people to read."""
        for one in self.setup.answer(self.server):
            self.folder.ledger.append(Answer(self.round, one.domain, one.prompt, one.expected, one.text))

    def save(self, *, midway: bool = False) -> None:
        """Ledger first, then the checkpoint that counts its rows: a crash between the two loses nothing.

        midway: the round is not over, and goes on where this checkpoint is taken up.
        """
        for text in self.tracking.troubles():
            self.note(self.round, text)
        rows = self.folder.ledger.sync()
        self.folder.save(
            self.sites.remember(
                Snapshot(
                    round=self.round - midway,
                    server=self.server,
                    archive=self.archive.payloads,
                    digests=self.archive.digests,
                    ledger_rows=rows,
                    fingerprint=self.setup.fingerprint,
                    best=self.best,
                    seconds=self.seconds,
                    underway=None if self.buffer is None else self.buffer.remember(),
                )
            )
        )
        give_back(4 * self.server.adapter.numel())  # payloads that were hashed
        self.saved = True

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a checkpoint."""
        self.round, self.server = snapshot.round, snapshot.server
        self.archive = Archive(snapshot.archive, partial(Spool, self.folder.path), snapshot.digests)
        self.best = snapshot.best
        self.course.take(read_rows(self.folder.ledger.path))
        self.saved, self.before = True, snapshot.seconds
        if self.buffer and snapshot.underway:
            self.buffer.restore(snapshot.underway, self.server)
        self.sites.restore(self, snapshot)
