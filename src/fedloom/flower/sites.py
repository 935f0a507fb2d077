"""The ServerApp: the rounds of a run, with the sites at the other end of Flower's messages.

Everything that a run leaves is in its folder on the SuperLink's machine. A run that was killed, together with the
SuperLink or not, is submitted again with --resume and goes on after its last whole round.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid as FlowerGrid
from flwr.serverapp import ServerApp

from fedloom.errors import CheckpointError, FedloomError, RoundError, StaleError, WireError
from fedloom.flower.control import certificate_ends, keep_number
from fedloom.flower.delivery import Delivery
from fedloom.flower.filling import Filling
from fedloom.flower.fleet import ANSWER_SECONDS, Fleet
from fedloom.flower.gathering import Gathering
from fedloom.flower.messages import Grid, Reply
from fedloom.flower.muster import muster_sites
from fedloom.flower.secret import SecretRound, forget_sum, take_late_message
from fedloom.flower.settings import check_flower_settings, join_settings
from fedloom.methods.method import State
from fedloom.model.identity import base_digest
from fedloom.records.config import Config
from fedloom.records.events import Observer, RunSummary, Silent
from fedloom.records.ledger import Presence, Roll, Row, Training, Transfer
from fedloom.records.text import to_printable
from fedloom.rounds.checks import UpdateFacts, check_update
from fedloom.rounds.decoded import Decoded
from fedloom.rounds.memory import give_back
from fedloom.server.attendance import Attendance
from fedloom.server.buffer import Buffer
from fedloom.server.engine import Updates
from fedloom.server.loop import Rounds
from fedloom.server.spool import Spool
from fedloom.site.protocol import Fact, Parcel
from fedloom.workspace.assemble import Setup, build_setup
from fedloom.workspace.checkpoint import KnownSite, Snapshot
from fedloom.workspace.data import heldout_examples, public_examples, validation_examples
from fedloom.workspace.folder import RunFolder

UNKNOWN = -1
"""The version of a site that must be sent the full state."""


def run_federation(
    grid: Grid,
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    observer: Observer | None = None,
    notes: Sequence[str] = (),
    number: int | None = None,
) -> RunSummary:
    """Play the run with the sites that `grid` reaches, leaving its results in `out`. notes: known of their data.

    number: what the SuperLink calls the run, by which it can be stopped; None where there is no SuperLink.

    Sites hold a job to the rounds that it began with: a run cannot be given more.
    """
    check_flower_settings(config)
    with RunFolder.open(out, config, resume=resume, force=force, extend=False) as folder:
        keep_number(folder.path, number)
        return prepare_rounds(grid, folder, resume, observer or Silent(), notes, number).play(resume)


def prepare_rounds(
    grid: Grid, folder: RunFolder, resume: bool, observer: Observer, notes: Sequence[str], number: int | None
) -> Rounds:
    """The run in an open folder, ready to be played. The first adapter is held by the server's first state alone."""
    config, told = folder.config, [*notes]
    heldout = heldout_examples(config.data, told.append)
    nothing = dict.fromkeys(sorted(config.federation.participants or ()), ())
    validation, public = validation_examples(config, told.append), public_examples(config, told.append)
    setup = build_setup(config, nothing, heldout, notes=told, validation=validation, public=public)
    facts = {"job": job_id(folder.path / "job", resume), "base": base_digest(config.model.path)}
    fleet = Fleet(grid, facts, tuple(setup.sites), expects=4 * setup.initial.numel())
    ends = {} if number is None else certificate_ends(config.flower)
    outlined = setup.outlined().with_files_in(folder.path)
    sites = FlowerSites(outlined, fleet, simulated=number is None)
    return Rounds(outlined, folder, observer, sites, ends, setup.initial)


def job_id(path: Path, resume: bool) -> str:
    """16 hex digits that name the run to its sites, the same after a resume."""
    if resume and path.exists():
        return path.read_text(encoding="utf-8")
    if resume:
        raise CheckpointError(f"{path} is missing: the folder holds no run of the Flower engine")
    path.write_text(secrets.token_hex(8), encoding="utf-8")
    return path.read_text(encoding="utf-8")


class FlowerSites:
    """The sites at the other end of Flower's messages, and what is known of each: version, digest, last counted round.

    sent: bytes that a site was sent since it answered last, for who watches the run. seen: who was there at the last
    look that was recorded. simulated: whether the sites are made up, so that nothing has left this machine.
    """

    def __init__(self, setup: Setup, fleet: Fleet, *, simulated: bool = False) -> None:
        self.setup = setup
        self.together = True
        self.fleet = fleet
        self.simulated = simulated
        self.sent: dict[str, int] = {}
        self.seen: Presence | None = None
        self.unsaved: set[str] = set()  # whose update waits in the buffer, and in no checkpoint
        self.updates: Spool[str]
        self.decoded: Decoded
        self.known = dict.fromkeys(setup.sites, KnownSite(UNKNOWN))

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def collect(self, rounds: Rounds, present: Attendance) -> Updates:
        """The updates of one round; who gave none is noted with the reason."""
        rules, job = self.setup.config.flower, self.setup.job
        self.muster(rounds)
        if job.secure:  # what leaves a site then is no update
            return SecretRound(self, rounds, present).collect()
        self.updates, self.decoded = Spool(rounds.folder.path), Decoded.beside(rounds.server)
        gathering = Gathering(
            self.fleet,
            rules,
            job.caps,
            rounds.round,
            present.asked,
            partial(self.ask_turn, rounds),
            partial(self.check, rounds),
            partial(self.take_stray, rounds),
            partial(self.note_presence, rounds),
        )
        try:
            answers = gathering.play()
        finally:
            self.note_roll(rounds, gathering.roll())
        for site in self.updates.keys() - answers.keys():  # it was out of proportion
            del self.updates[site]
            self.decoded.drop(site)
        return Updates(self.updates, answers, rules.min_replies, decoded=self.decoded)

    def fill(self, rounds: Rounds, buffer: Buffer) -> bool:
        """Updates into the buffer until it is full; who gave none, and is not at a turn, is noted with the reason."""
        self.muster(rounds)
        filling = Filling(self, rounds, buffer)
        try:
            filling.play()
        finally:
            self.note_roll(rounds, filling.roll())
        return False

    def muster(self, rounds: Rounds) -> None:
        """Before the first round the sites come in."""
        if not self.fleet.names:
            take, looked = partial(self.take_stray, rounds), partial(self.note_presence, rounds)
            muster_sites(self.fleet, self.setup.config.flower, take, looked)

    def note_roll(self, rounds: Rounds, roll: Roll) -> None:
        """Record who answered in a round, and say of everybody else why not."""
        for site, reason in [*roll.failed.items(), *roll.late.items()]:
            rounds.note(rounds.round, f"client {site}: {reason}")
        rounds.folder.ledger.append(roll)
        rounds.folder.ledger.sync()

    def note_presence(self, rounds: Rounds) -> None:
        """Record who is there and who is not, where that has changed."""
        now = self.fleet.presence(rounds.round)
        if self.seen is None or (now.online, now.missing) != (self.seen.online, self.seen.missing):
            self.seen = now
            rounds.folder.ledger.append(now)
            rounds.folder.ledger.sync()

    def ask_turn(self, rounds: Rounds, site: str, seconds: float) -> None:
        """Ask a site for a turn that is worth beginning for so many seconds."""
        margin = max(ANSWER_SECONDS, self.setup.config.flower.deadline)
        self.send(rounds, site, "turn", {"expires": seconds}, seconds + margin)

    def send(self, rounds: Rounds, site: str, ask: str, facts: Mapping[str, Fact], ttl: float) -> None:
        """Ask a site, with whatever it has missed. facts: what else it is told; ttl: how long Flower keeps it."""
        rounds.observer.client_started(rounds.round, site)
        delivery, alone = ask == "deliver", self.fleet.takes_newest(site)
        payloads = tuple(rounds.send_missed(site, self.known[site].version, delivery=delivery, alone=alone))
        self.sent[site] = self.sent.get(site, 0) + sum(map(len, payloads))
        parcel = Parcel({**facts, "counted": self.known[site].counted}, payloads)
        rounds.folder.ledger.sync()  # first, so that nothing leaves that a crash could leave uncounted
        self.fleet.post(self.fleet.names[site], site, ask, rounds.round, parcel, ttl)
        size = sum(map(len, payloads))
        del payloads, parcel
        give_back(size)

    def check(self, rounds: Rounds, site: str, reply: Reply) -> UpdateFacts:
        """Keep the update in a reply; what was seen of it. Raises the FedloomError that says why it is no use."""
        self.updates[site], seen = self.read_update(rounds, site, reply, rounds.server, self.decoded)
        return seen

    def read_update(
        self, rounds: Rounds, site: str, reply: Reply, base: State, decoded: Decoded | None = None
    ) -> tuple[bytes, UpdateFacts]:
        """The update in a reply, which is to rest on `base`, and what was seen of it; recorded.

        Raises the FedloomError that says why it is no use.
        """
        self.locate(rounds, site, reply)
        parcel = reply.parcel
        if reply.error or parcel is None:
            raise RoundError(reply.error)
        if len(parcel.payloads) != 1:
            raise WireError(f"refused: {len(parcel.payloads)} payloads where one update was expected")
        payload = parcel.payloads[0]
        try:
            seen = check_update(self.setup.job, base, site, payload, reply.asked.round, decoded)
        except FedloomError as error:
            raise type(error)(f"refused: {to_printable(str(error))}") from None
        self.know(site, base.version, base.digest)
        said, loss = reply.said, math.nan if reply.said.loss is None else reply.said.loss
        trained = Training(rounds.round, site, loss, said.steps, seen.examples, said.seconds)
        rounds.take_update(trained, payload, self.sent.pop(site, 0))
        rounds.folder.ledger.sync()
        return payload, seen

    def take_stray(self, rounds: Rounds, reply: Reply) -> str | None:
        """Take a reply that does not answer the round in progress. Returns what is worth reporting about it."""
        asked, site = reply.asked, reply.asked.site
        if asked.ask == "hello":
            reason = self.fleet.introduce(reply)
            if reason:
                rounds.note(rounds.round, reason)
            elif reply.parcel is not None and not reply.error:
                self.locate(rounds, reply.said.name, reply)
            return None
        take_late_message(rounds, reply)
        self.locate(rounds, site, reply)
        if asked.ask != "turn" or reply.said.dropped or reply.error or reply.parcel is None:
            return None
        reason = self.take_late(rounds, site, reply.parcel.payloads)
        return f"its update of round {asked.round} came after {reply.seconds:.0f} s and was refused: {reason}"

    def take_late(self, rounds: Rounds, site: str, payloads: Sequence[bytes]) -> str:
        """Why what came too late is not averaged. One update of an update's size is counted and kept, nothing else."""
        if len(payloads) != 1:
            hidden = self.setup.job.secure and not payloads
            return "its round was over" if hidden else f"{len(payloads)} payloads where one update was expected"
        try:
            check_update(self.setup.job, rounds.server, site, payloads[0], rounds.round)
        except StaleError as error:
            reason = str(error)
        except FedloomError as error:
            return to_printable(str(error))
        else:
            reason = "its round was over"
        rounds.folder.transfer(rounds.round, site, "up", payloads[0])
        rounds.folder.ledger.sync()
        return to_printable(reason)

    def locate(self, rounds: Rounds, site: str, reply: Reply) -> None:
        """Keep what a reply says of its site's state. A state that the server does not know counts as none."""
        version, digest = reply.said.version, reply.said.digest
        if version is not None and digest is not None:
            self.know(site, version if digest == digest_of(rounds, version) else UNKNOWN, digest)

    def know(self, site: str, version: int, digest: str) -> None:
        """Remember which state a site holds."""
        self.known[site] = replace(self.known[site], version=version, digest=digest)

    def advance(self, rounds: Rounds, payload: bytes, counted: Collection[str]) -> None:
        """Remember whose updates were averaged; what the sites hold is theirs to say.

        In asynchronous rounds an update counts once it waits (`take_in`), and a site may be at a later turn by now.
        """
        for site in () if rounds.buffer else counted:
            self.known[site] = replace(self.known[site], counted=rounds.round)

    def remember(self, snapshot: Snapshot) -> Snapshot:
        """The checkpoint, with what is known of every site in it."""
        self.unsaved.clear()
        return replace(snapshot, known=self.known)

    def keep_sent(self, rows: Sequence[Row]) -> list[Row]:
        """Of the rows of rounds that a crash has undone, those that stay true: what has travelled between machines."""
        if self.simulated:
            return []
        return [replace(row, undone=True) for row in rows if isinstance(row, Transfer)]

    def restore(self, rounds: Rounds, snapshot: Snapshot) -> None:
        """Take up what the checkpoint knows.

        Turns that were under way are asked for anew: the messages that asked for them were the last server's.
        """
        self.known |= snapshot.known
        if rounds.buffer:
            rounds.buffer.lose_all()

    def deliver(self, rounds: Rounds) -> None:
        """Send the result to every site that is there and has not confirmed it; who does not confirm it is noted."""
        forget_sum(rounds.folder.path)
        owed = [site for site, known in self.known.items() if not known.delivered]
        if not owed:
            return
        if rounds.buffer:
            self.fleet.withdraw_all()
        rounds.save()  # no site may be ahead of the newest checkpoint: a crash from here on undoes no round
        deadline = self.setup.config.flower.deadline
        delivery = Delivery(
            self.fleet,
            owed,
            deadline,
            lambda site: self.send(rounds, site, "deliver", {}, deadline + ANSWER_SECONDS),
            partial(self.take_late_for_delivery, rounds),
            partial(self.note_presence, rounds),
        )
        delivery.play()
        for site in sorted(delivery.confirmed):
            self.known[site] = replace(self.known[site], delivered=True)
        for site, reason in sorted(delivery.missing.items()):
            rounds.note(rounds.round, f"client {site} has not confirmed that it received the result: {reason}")
        rounds.save()

    def take_late_for_delivery(self, rounds: Rounds, reply: Reply) -> None:
        """Take what comes in while the result is delivered; an update that is too late is noted."""
        if reason := self.take_stray(rounds, reply):
            rounds.note(rounds.round, f"client {reply.asked.site}: {reason}")


def digest_of(rounds: Rounds, version: int) -> str:
    """The digest of the global state of a version; "" where the server no longer knows it."""
    now = rounds.server
    return now.digest if version == now.version else rounds.archive.digests.get(version, "")


app = ServerApp()


@app.main()
def main(grid: FlowerGrid, context: Context) -> None:
    """What Flower calls. The settings came with the run (`launch`)."""
    told, number = context.run_config, context.run_id
    settings, out = join_settings(str(told["settings"]), str(told["own"])), Path(str(told["out"]))
    resume, force = bool(told["resume"]), bool(told.get("force", False))
    run_federation(grid, settings, out, resume=resume, force=force, number=number).check()
