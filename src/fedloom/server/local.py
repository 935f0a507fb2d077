"""Sites on this machine: one resident base model, adapters swapped in and out, every payload through the wire."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from fedloom.errors import FedloomError, NumericError
from fedloom.methods.method import Method, State
from fedloom.records.config import Config
from fedloom.records.events import Observer, RunSummary, Silent
from fedloom.records.ledger import Row, Training
from fedloom.rounds.checks import check_update
from fedloom.rounds.step import Train, Trained, fit_to_task
from fedloom.rounds.turns import ClientTurn, client_turn
from fedloom.server.attendance import Attendance
from fedloom.server.buffer import Buffer, choose_next
from fedloom.server.engine import Updates
from fedloom.server.loop import Rounds
from fedloom.server.nursery_process import Nursery, begin_nursery
from fedloom.server.pool import Pool
from fedloom.server.regions import RegionalServers
from fedloom.server.roster import Roster
from fedloom.server.secret import SecretSites
from fedloom.server.tasks import Turn
from fedloom.server.timeline import Flight, Timeline, draw_order, draw_vanishing
from fedloom.server.workers import fill_pool, load_without_weights
from fedloom.workspace.assemble import Setup, load_setup
from fedloom.workspace.checkpoint import Snapshot
from fedloom.workspace.folder import RunFolder
from fedloom.workspace.participants import check_clients_exist
from fedloom.workspace.private import forget_secret, refuse_own_trainer, run_secret
from fedloom.workspace.regions import plan_regions


def run_local(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    observer: Observer | None = None,
    method: Method | None = None,
    trainers: Mapping[str, Train] | None = None,
    nursery: Nursery | None = None,
) -> RunSummary:
    """Simulate the whole federation that `config` describes, leaving its results in the folder `out`.

    resume: go on with the run in `out`; it may be given more rounds. force: move that run aside.
    method: takes the place of the one that `config` names. Its settings are bound in it and are not checked on resume.
    trainers: client → its training step, such as `patch` makes; the other clients train as `config` says.
    nursery: where the workers that `config` asks for come from, if that was begun already.
    Raises ConfigError, DataError or ModelError for what the user can mend, CheckpointError where `out` holds
    another run or, with `resume`, nothing to go on from. A run that came to nothing says why in its summary.
    """
    nest = nullcontext(nursery) if nursery else begin_nursery(config)
    with RunFolder.open(out, config, resume=resume, force=force) as folder, nest as begun:
        pool = fill_pool(config, method, begun) if begun else None
        setup = load_without_weights(config, method, pool) if pool else load_setup(config, method)
        secret = run_secret(out, config)
        setup = replace(setup, secret=secret) if secret else setup
        sites = LocalSites(setup, trainers=trainers, pool=pool, secret=secret)
        summary = Rounds(setup, folder, observer or Silent(), sites).play(resume)
        forget_secret(out)
        return summary


Look = Callable[[int, str, State, ClientTurn], None]
"""(round, client, its state before, its turn): called after every turn, for who studies what clients train."""
Played = tuple[str, int, ClientTurn | None]
"""A client, the bytes that it was sent, and its turn; None, noted, where nothing came of it."""


class LocalSites:
    """Every client of a simulation: played one after the other on the one model, or side by side by the pool's workers.

    trainers: client → a training step of its own. secret: what the workers' noise on examples comes from. Raises
    ConfigError for a client that there is not.
    """

    def __init__(
        self,
        setup: Setup,
        look: Look | None = None,
        *,
        trainers: Mapping[str, Train] | None = None,
        pool: Pool | None = None,
        secret: bytes = b"",
    ) -> None:
        trainers = trainers or {}
        if trainers:
            refuse_own_trainer(setup.config, setup.job.method)
        check_clients_exist(trainers, setup.sites, "trainers[{name!r}] is")
        self.setup = setup
        self.noise_key = secret
        self.pool = pool
        self.together = pool is not None
        self.look = look
        self.steps = {client: fit_to_task(train, setup.task(client)) for client, train in trainers.items()}
        self.diverged: set[str] = set()  # clients whose training of this round came to nothing
        self.timeline = Timeline(setup.config.federation)
        regions = plan_regions(setup.config.federation.regions, tuple(setup.sites), setup.job.method)
        self.regions = RegionalServers(regions) if regions else None
        self.secret = SecretSites(self) if setup.job.secure else None
        self.roster = Roster(setup.job, setup.initial, {name: site.ranks for name, site in setup.sites.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.roster)

    def collect(self, rounds: Rounds, present: Attendance) -> Updates:
        """The updates of one round, by client; who gave none is noted."""
        self.diverged = set()
        if self.secret:
            return self.secret.collect(rounds, present)
        there: dict[str, bytes] = {}
        for client, received, turn in self.play_turns(rounds, present):
            if turn is not None:
                self.roster.hold(client, turn.state)
                rounds.take_update(training_row(rounds.round, client, turn.trained), turn.payload, received)
                there[client] = turn.payload
        diverged = not there and self.diverged == set(present.asked) - present.vanished != set()
        return Updates(there, diverged=diverged, tree=self.regions.tree(rounds) if self.regions else None)

    def play_turns(self, rounds: Rounds, present: Attendance) -> Iterator[Played]:
        """The turns of those who are present, in their order: one after another, or side by side by the workers."""
        if self.pool:
            yield from self.play_with(self.pool, rounds, present)
            return
        for client in present.asked:
            yield self.play(rounds, client, client in present.vanished)

    def play(self, rounds: Rounds, client: str, vanishes: bool) -> Played:
        """One client's turn in this process."""
        rounds.observer.client_started(rounds.round, client)
        received = self.download(rounds, client)
        return client, received, self.train(rounds, client, vanishes)

    def train(self, rounds: Rounds, client: str, vanishes: bool) -> ClientTurn | None:
        """The turn of a client in step; None, noted, where nothing comes of it."""
        if vanishes:
            rounds.note(rounds.round, f"client {client} dropped out after the download")
            return None
        state, step = self.roster[client], self.steps.get(client) or self.setup.train(client)
        return self.take(rounds, client, lambda: client_turn(self.setup.job, client, state, [], step, rounds.round))

    def play_with(self, pool: Pool, rounds: Rounds, present: Attendance) -> Iterator[Played]:
        """Every client's turn, side by side; those with a step of their own train here."""
        sent: dict[str, tuple[int, list[bytes]]] = {}  # what a client that trains was given, until it is recorded
        turns = pool.run(
            self.ask_ahead(rounds, present, sent), lambda turn: rounds.observer.client_started(turn.round, turn.client)
        )
        for client in present.asked:
            if self.trains_here(client, present):
                yield self.play(rounds, client, client in present.vanished)
                continue
            ticket = next(turns)
            version, payloads = sent.pop(client)
            for held, payload in enumerate(payloads, start=version):
                rounds.folder.transfer(rounds.round, client, "down", payload, version=held)
            if self.regions:
                self.regions.bring(rounds, client, payloads, delivery=False)
            yield client, sum(map(len, payloads)), self.take(rounds, client, ticket.result)

    def ask_ahead(
        self, rounds: Rounds, present: Attendance, sent: dict[str, tuple[int, list[bytes]]]
    ) -> Iterator[Turn]:
        """What workers are asked; the client is brought in step with the server as its turn is drawn."""
        for client in present.asked:
            if self.trains_here(client, present):
                continue
            version, ranks = self.roster[client].version, self.setup.sites[client].ranks
            payloads = rounds.archive.payloads_for(self.setup.job, rounds.server, version, ranks, rounds.round)
            self.roster.receive(client, payloads)
            sent[client] = version, payloads
            yield Turn(client, self.roster[client], rounds.round, self.noise_key)

    def trains_here(self, client: str, present: Attendance) -> bool:
        """Whether no worker can play it: it does not train, or by a step that only this process has."""
        return client in present.vanished or client in self.steps

    def take(self, rounds: Rounds, client: str, play: Callable[[], ClientTurn]) -> ClientTurn | None:
        """Play a turn, or wait for it; None, noted, where its training came to nothing."""
        state = self.roster[client]
        try:
            turn = play()
        except NumericError as error:
            rounds.note(rounds.round, str(error), "diverged")
            self.diverged.add(client)
            return None
        if self.look is not None:
            self.look(rounds.round, client, state, turn)
        return turn

    def fill(self, rounds: Rounds, buffer: Buffer) -> bool:
        """Let simulated time go by until the buffer is full: who is free begins a turn, who is due sends its update."""
        federation, self.diverged = self.setup.config.federation, set()
        order, begun = draw_order(federation, tuple(self.roster), rounds.round), 0
        while not buffer.is_full:
            next_ones = choose_next(order, buffer, rounds.round, self.roster)
            vanished = frozenset(name for name in next_ones if draw_vanishing(federation, name, rounds.round))
            begun += len(next_ones) - len(vanished)
            for client, received, turn in self.play_turns(rounds, Attendance(tuple(next_ones), vanished)):
                buffer.begin(client, rounds.round, rounds.server)
                trained = None if turn is None else training_row(rounds.round, client, turn.trained)
                self.timeline.begin(client, buffer.now, received, turn, trained)
            if not self.timeline.flights:
                break
            for flight in self.timeline.land(rounds.round):
                buffer.now = flight.due
                self.end(rounds, buffer, flight)
        return 0 < begun == len(self.diverged)

    def end(self, rounds: Rounds, buffer: Buffer, flight: Flight) -> None:
        """A client's turn is over; what it remembers of it counts where its update does."""
        client = flight.client
        if flight.trained is None:
            buffer.end(client)
            return
        rounds.take_update(replace(flight.trained, round=rounds.round), flight.payload, flight.received)
        base, asked = buffer.base_of(client, rounds.server), buffer.begun[client].round
        try:
            facts = check_update(self.setup.job, base, client, flight.payload, asked)
            buffer.take_in(client, flight.payload, facts, rounds.server)
        except FedloomError as error:
            buffer.end(client)
            rounds.note(rounds.round, f"client {client} refused: {error}", "refused")
            return
        self.roster.hold(client, replace(self.roster[client], memory=flight.memory))

    def download(self, rounds: Rounds, client: str, *, delivery: bool = False) -> int:
        """Bring the client in step with the server; returns the bytes that it received."""
        payloads = rounds.send_missed(client, self.roster[client].version, delivery=delivery)
        if self.regions:
            self.regions.bring(rounds, client, payloads, delivery=delivery)
        self.roster.receive(client, payloads)
        return sum(map(len, payloads))

    def advance(self, rounds: Rounds, payload: bytes, counted: Collection[str]) -> None:
        """The clients' states follow the server's; who is not sent the payload is behind from now on."""
        self.roster.follow(payload)

    def deliver(self, rounds: Rounds) -> None:
        """Everybody receives the result, whoever took part in the last round."""
        for client in self.roster:
            self.download(rounds, client, delivery=True)

    def keep_sent(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Nothing: here all payloads stay in one process, and a round that is played anew is the only one."""
        return ()

    def remember(self, snapshot: Snapshot) -> Snapshot:
        """The checkpoint, with the state of every client that was ever asked, and every turn that is in flight."""
        underway = snapshot.underway and snapshot.underway.joined(self.timeline.remember())
        return replace(snapshot, clients=self.roster.attended(), underway=underway)

    def restore(self, rounds: Rounds, snapshot: Snapshot) -> None:
        """Every client's state as the checkpoint has it; who is not in it was never asked."""
        if snapshot.server.version:
            self.roster.follow(rounds.full_state())
        for client, state in snapshot.clients.items():
            self.roster.hold(client, state)
        if snapshot.underway:
            self.timeline.restore(snapshot.underway)

    @property
    def states(self) -> dict[str, State]:
        """What each client holds."""
        return dict(self.roster)


def training_row(round: int, client: str, said: Trained) -> Training:
    """What a client's training said, as a row of the ledger."""
    return Training(round, client, said.loss, said.steps, said.num_examples, said.seconds, said.stages)
