"""The ServerApp: the rounds of a run, with the sites at the other end of Flower's messages.

Everything that a run leaves is in its folder on the SuperLink's machine. A run that was killed, together with the
SuperLink or not, is submitted again with --resume and goes on after its last whole round.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid as FlowerGrid
from flwr.serverapp import ServerApp

from fedloom.errors import CheckpointError, FedloomError, RoundError, StaleError, WireError
from fedloom.flower.fleet import Fleet, Grid, Reply
from fedloom.flower.gathering import POLL_SECONDS, Answer, Gathering
from fedloom.flower.settings import check, joined
from fedloom.lora.pair import LoraState
from fedloom.methods.method import State
from fedloom.model.base import base_digest
from fedloom.records.config import Config
from fedloom.records.events import Observer, Silent
from fedloom.records.ledger import Training
from fedloom.records.text import printable
from fedloom.rounds.checks import Seen, check_update
from fedloom.rounds.turns import ServerTurn, server_turn
from fedloom.server.local import Attendance, Simulation, choice
from fedloom.server.roster import Held
from fedloom.site.protocol import Parcel
from fedloom.wire import read_header
from fedloom.workspace.assemble import Setup, assemble, heldout_examples
from fedloom.workspace.folder import RunFolder

UNKNOWN = -1
"""The version of a site that must be sent the full state."""


def serve(grid: Grid, config: Config, out: Path, *, resume: bool = False, observer: Observer | None = None) -> None:
    """Play the run with the sites that `grid` reaches, leaving its results in `out`."""
    check(config)
    with RunFolder.open(out, config, resume=resume) as folder:
        setup = assemble(
            config, {name: [] for name in sorted(config.federation.participants or ())}, heldout_examples(config.data)
        )
        facts = {"job": job_id(folder.path / "job", resume), "base": base_digest(config.model.path)}
        fleet = Fleet(grid, facts, tuple(setup.sites))
        Federation(setup, folder, observer or Silent(), fleet).play(resume)


def job_id(path: Path, resume: bool) -> str:
    """16 hex digits that name the run to its sites, the same after a resume."""
    if resume and path.exists():
        return path.read_text(encoding="utf-8")
    if resume:
        raise CheckpointError(f"{path} is missing: the folder holds no run of the Flower engine")
    path.write_text(secrets.token_hex(8), encoding="utf-8")
    return path.read_text(encoding="utf-8")


class Federation(Simulation):
    """The server's side of a run. `clients` holds what is known of each site: version, digest, last counted round.

    sent: bytes that a site was sent since it answered last, for who watches the run. seen: what the checks saw of the
    updates of the round in progress.
    """

    def __init__(self, setup: Setup, folder: RunFolder, observer: Observer, fleet: Fleet) -> None:
        super().__init__(setup, folder, observer)
        self.fleet = fleet
        self.sent: dict[str, int] = {}
        self.seen: dict[str, Seen] = {}
        self.clients = Held(dict.fromkeys(setup.sites, State(LoraState(), version=UNKNOWN)))

    def collect(self, round: int, present: Attendance) -> dict[str, bytes]:
        """The updates of one round; who gave none is noted with the reason."""
        if not self.fleet.names:
            self.muster()
        gathering = Gathering(
            self.fleet,
            self.setup.config.flower,
            self.setup.job.caps,
            round,
            present.asked,
            lambda site: self.send(site, "turn", round),
            self.checked,
            self.stray,
        )
        try:
            answers = gathering.play()
        finally:
            roll = gathering.roll()
            for site, reason in [*roll.failed.items(), *roll.late.items()]:
                self.folder.ledger.note(round, f"client {site}: {reason}")
            self.folder.ledger.append(roll)
            self.folder.ledger.sync()
        self.seen = {site: answer.seen for site, answer in answers.items()}
        return {site: answer.payload for site, answer in answers.items()}

    def muster(self) -> None:
        """Wait until every site has said hello; go on without some at the deadline, or after a grace without news.

        Raises RoundError if there are too few.
        """
        rules = self.setup.config.flower
        until = time.monotonic() + rules.deadline
        while time.monotonic() < until and set(self.fleet.names) != set(self.clients):
            self.fleet.look()
            time.sleep(POLL_SECONDS)
            for reply in self.fleet.collect():
                self.stray(reply)
                if rules.grace is not None and len(self.fleet.names) >= rules.min_replies:
                    until = min(until, time.monotonic() + rules.grace)
        if len(self.fleet.names) < rules.min_replies:
            refused = "; ".join(stranger.reason for stranger in self.fleet.strangers.values())
            raise RoundError(
                f"{len(self.fleet.names)} of {len(self.clients)} sites are there after {rules.deadline:g} s, "
                f"flower.min_replies is {rules.min_replies}{f' ({refused})' if refused else ''}: run `fedloom "
                "federation doctor` at the sites"
            )

    def send(self, site: str, ask: str, round: int) -> None:
        """Ask a site, with whatever it has missed."""
        self.observer.client_started(round, site)
        payloads = tuple(self.missed(site, round))
        self.sent[site] = self.sent.get(site, 0) + sum(map(len, payloads))
        parcel = Parcel({"counted": self.counted(site)}, payloads)
        self.fleet.post(self.fleet.names[site], site, ask, round, parcel)
        self.folder.ledger.sync()

    def counted(self, site: str) -> int:
        """The last round in which an update of the site was averaged; 0 if none was."""
        return int(self.clients[site].memory.get("counted", torch.tensor(0)))

    def checked(self, site: str, reply: Reply) -> Answer:
        """The update in a reply. Raises the FedloomError that says why there is none that can be averaged."""
        self.locate(site, reply)
        parcel = reply.parcel
        if reply.error or parcel is None:
            raise RoundError(reply.error)
        if len(parcel.payloads) != 1:
            raise WireError(f"refused: {len(parcel.payloads)} payloads where one update was expected")
        round, payload = reply.asked.round, parcel.payloads[0]
        try:
            seen = check_update(self.setup.job, self.server, site, payload, round)
        except FedloomError as error:
            raise type(error)(f"refused: {printable(str(error))}") from None
        self.folder.transfer(round, site, "up", payload)
        self.know(site, self.server.version, self.server.digest)
        said, loss = reply.said, math.nan if reply.said.loss is None else reply.said.loss
        self.record(Training(round, site, loss, said.steps, seen.examples, said.seconds))
        if round == 1 and self.setup.job.budget:
            self.folder.ledger.note(round, f"client {site}: {choice(payload, self.setup.job.budget)}")
        self.observer.client_finished(round, site, loss, len(payload), self.sent.pop(site, 0))
        return Answer(payload, seen)

    def stray(self, reply: Reply) -> str | None:
        """Take a reply that is no answer to the round in progress; what is worth reporting about it."""
        asked, site = reply.asked, reply.asked.site
        if asked.ask == "hello":
            reason = self.fleet.introduce(reply)
            if reason:
                self.folder.ledger.note(self.round, reason)
            elif reply.parcel is not None and not reply.error:
                self.locate(reply.said.name, reply)
            return None
        self.locate(site, reply)
        if asked.ask == "deliver" or reply.error or reply.parcel is None:
            return None
        reason = self.late(site, reply.parcel.payloads)
        return f"its update of round {asked.round} came after {reply.seconds:.0f} s and was refused: {reason}"

    def late(self, site: str, payloads: Sequence[bytes]) -> str:
        """Why what came too late is not averaged. One update of an update's size is counted and kept, nothing else."""
        if len(payloads) != 1:
            return f"{len(payloads)} payloads where one update was expected"
        try:
            check_update(self.setup.job, self.server, site, payloads[0], self.round)
        except StaleError as error:
            reason = str(error)
        except FedloomError as error:
            return printable(str(error))
        else:
            reason = "its round was over"
        self.folder.transfer(self.round, site, "up", payloads[0])
        return printable(reason)

    def locate(self, site: str, reply: Reply) -> None:
        """Keep what a reply says of the state that its site holds; a state of no known history counts as none."""
        version, digest = reply.said.version, reply.said.digest
        if version is not None and digest is not None:
            self.know(site, version if digest == self.digest_of(version) else UNKNOWN, digest)

    def digest_of(self, version: int) -> str:
        """The digest of the global state of a version; "" where the server no longer knows it."""
        if version == self.server.version:
            return self.server.digest
        payload = self.archive.payloads.get(version)
        return "" if payload is None else read_header(payload).base_digest

    def know(self, site: str, version: int, digest: str) -> None:
        """Remember which state a site holds."""
        self.clients.hold(site, replace(self.clients[site], version=version, digest=digest))

    def combine(self, payloads: Mapping[str, bytes], round: int) -> ServerTurn:
        """The server's turn, with at least `min_replies` updates that can be averaged."""
        least = self.setup.config.flower.min_replies
        return server_turn(self.setup.job, self.server, payloads, round, seen=self.seen, least=least)

    def aggregate(self, payloads: Mapping[str, bytes], round: int) -> ServerTurn:
        """As everywhere; and remember whose updates were counted."""
        turn = super().aggregate(payloads, round)
        for site in payloads:
            if site not in turn.refused:
                self.clients.hold(site, replace(self.clients[site], memory={"counted": torch.tensor(round)}))
        return turn

    def deliver_last(self) -> None:
        """Send the result to every site that is connected; who did not confirm is noted."""
        rules = self.setup.config.flower
        self.fleet.look()
        waiting = {site for site in self.clients if self.fleet.here(site)}
        for site in sorted(waiting):
            self.send(site, "deliver", self.round)
        until = time.monotonic() + (rules.deadline if rules.grace is None else rules.grace)
        while waiting and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            for reply in self.fleet.collect():
                if reply.asked.ask == "deliver" and not reply.error:
                    waiting.discard(reply.asked.site)
                self.stray(reply)
        for site in sorted(waiting | {site for site in self.clients if not self.fleet.here(site)}):
            self.folder.ledger.note(self.round, f"client {site} has not confirmed that it received the result")


app = ServerApp()


@app.main()
def main(grid: FlowerGrid, context: Context) -> None:
    """What Flower calls. The settings came with the run (`launch`)."""
    told, out = context.run_config, Path(str(context.run_config["out"]))
    serve(grid, joined(str(told["settings"]), str(told["own"])), out, resume=bool(told["resume"]))
