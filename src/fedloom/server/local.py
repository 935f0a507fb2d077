"""Sites in this process: one resident base model, adapters swapped in and out, every payload through the wire."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedloom.errors import NumericError
from fedloom.methods.method import Method, State
from fedloom.records.config import Config
from fedloom.records.events import Observer, RunSummary, Silent
from fedloom.records.ledger import Row, Training
from fedloom.rounds.turns import ClientTurn, Train, client_turn, fit_to_task
from fedloom.server.attendance import Attendance
from fedloom.server.loop import Rounds, Updates
from fedloom.server.roster import Roster
from fedloom.workspace.assemble import Setup, check_clients_exist, load_setup
from fedloom.workspace.checkpoint import Snapshot
from fedloom.workspace.folder import RunFolder


def run_local(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    observer: Observer | None = None,
    method: Method | None = None,
    trainers: Mapping[str, Train] | None = None,
) -> RunSummary:
    """Simulate the whole federation that `config` describes, leaving its results in the folder `out`.

    resume: go on with the run in `out`; it may be given more rounds. force: move that run aside.
    method: takes the place of the one that `config` names. Its settings are bound in it and are not checked on resume.
    trainers: client → its training step, such as `patch` makes; the other clients train as `config` says.
    Raises ConfigError, DataError or ModelError for what the user can mend, CheckpointError where `out` holds
    another run or, with `resume`, nothing to go on from. A run that came to nothing says why in its summary.
    """
    with RunFolder.open(out, config, resume=resume, force=force) as folder:
        setup = load_setup(config, method)
        return Rounds(setup, folder, observer or Silent(), LocalSites(setup, trainers=trainers)).play(resume)


Look = Callable[[int, str, State, ClientTurn], None]
"""(round, client, its state before, its turn): called after every turn, for who studies what clients train."""


class LocalSites:
    """Every client of a simulation, played one after the other on the one model.

    trainers: client → a training step of its own. Raises ConfigError for a client that there is not.
    """

    def __init__(self, setup: Setup, look: Look | None = None, *, trainers: Mapping[str, Train] | None = None) -> None:
        trainers = trainers or {}
        check_clients_exist(trainers, setup.sites, "trainers[{name!r}] is")
        self.setup = setup
        self.look = look
        self.steps = {client: fit_to_task(train, setup.task(client)) for client, train in trainers.items()}
        self.diverged: set[str] = set()  # clients whose training of this round came to nothing
        self.roster = Roster(setup.job, setup.initial, {name: site.ranks for name, site in setup.sites.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.roster)

    def collect(self, rounds: Rounds, present: Attendance) -> Updates:
        """The updates of one round, by client; who gave none is noted."""
        self.diverged = set()
        turns = {client: self.play(rounds, client, client in present.vanished) for client in present.asked}
        there = {client: payload for client, payload in turns.items() if payload is not None}
        return Updates(there, diverged=not there and self.diverged == set(present.asked) - present.vanished != set())

    def play(self, rounds: Rounds, client: str, vanishes: bool) -> bytes | None:
        """One client's turn, recorded; None where it does not answer."""
        rounds.observer.client_started(rounds.round, client)
        received = self.download(rounds, client)
        if vanishes:
            rounds.note(rounds.round, f"client {client} dropped out after the download")
            return None
        state, step = self.roster[client], self.steps.get(client) or self.setup.train(client)
        try:
            turn = client_turn(self.setup.job, client, state, [], step, rounds.round)
        except NumericError as error:
            rounds.note(rounds.round, str(error), "diverged")
            self.diverged.add(client)
            return None
        self.roster.hold(client, turn.state)
        if self.look is not None:
            self.look(rounds.round, client, state, turn)
        trained = turn.trained
        rounds.take_update(
            Training(rounds.round, client, trained.loss, trained.steps, trained.num_examples, trained.seconds),
            turn.payload,
            received,
        )
        return turn.payload

    def download(self, rounds: Rounds, client: str, *, delivery: bool = False) -> int:
        """Bring the client in step with the server; returns the bytes that it received."""
        payloads = rounds.send_missed(client, self.roster[client].version, delivery=delivery)
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
        """The checkpoint, with the state of every client that was ever asked in it."""
        return replace(snapshot, clients=self.roster.attended())

    def restore(self, rounds: Rounds, snapshot: Snapshot) -> None:
        """Every client's state as the checkpoint has it; who is not in it was never asked."""
        if snapshot.server.version:
            self.roster.follow(rounds.full_state())
        for client, state in snapshot.clients.items():
            self.roster.hold(client, state)

    @property
    def states(self) -> dict[str, State]:
        """What each client holds."""
        return dict(self.roster)
