"""Simulated sites under secure aggregation: they play the whole protocol, in this process."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from fedloom.compress.seeds import derived_seed
from fedloom.errors import FedloomError
from fedloom.rounds.agreement import name_sum
from fedloom.rounds.secure import count_values, make_vector
from fedloom.rounds.turns import ClientTurn
from fedloom.secagg import PHASES, Invitation, Participant, Phase, unpack_vector
from fedloom.server.attendance import Attendance
from fedloom.server.engine import Updates
from fedloom.server.sums import collect_sum, hidden_training, record_message
from fedloom.workspace.private import noise_for_sum

if TYPE_CHECKING:
    from fedloom.server.local import LocalSites
    from fedloom.server.loop import Rounds

JOB = "simulation"
"""What sites of a simulation call the run: their keys are of one process, so no other run could be meant."""
TURN = "turn"


@dataclass(frozen=True, eq=False, slots=True)
class Kept:
    """What a site has made in a round and not sent: its vector, packed, and what it will remember if that counts.

    received: bytes that it was sent before it trained.
    """

    vector: bytes
    memory: Mapping[str, Tensor]
    received: int


class SecretSites:
    """The sites of a simulation as members of secure sums, each with a key of its own."""

    def __init__(self, sites: LocalSites) -> None:
        self.sites = sites
        self.identities: dict[str, Ed25519PrivateKey] = {}

    def collect(self, rounds: Rounds, present: Attendance) -> Updates:
        """The sum of a round's updates. Who drops out does so before it trains, or in one of the sum's phases."""
        leaving = {client: self.draw_leaving(rounds.round, client) for client in present.vanished}
        absent = frozenset(client for client, phase in leaving.items() if phase == TURN)
        kept: dict[str, Kept] = {}
        for client, received, turn in self.sites.play_turns(rounds, Attendance(present.asked, absent)):
            made = None if turn is None else self.make(rounds, client, turn, received)
            if made is not None:
                kept[client] = made
        if not kept:
            return Updates({}, diverged=self.sites.diverged == set(present.asked) - absent != set())
        keys = {client: self.identity(client).public_key().public_bytes_raw() for client in kept}
        name = name_sum(JOB, "", rounds.server)
        updates = collect_sum(rounds, name, keys, Seats(self, rounds, kept, leaving).ask)
        for client in updates.clients:
            self.sites.roster.hold(client, replace(self.sites.roster[client], memory=kept[client].memory))
        return updates

    def draw_leaving(self, round: int, client: str) -> str:
        """Where in a round a client drops out that does."""
        seed = derived_seed(self.sites.setup.config.federation.seed, "leaving", round, client)
        return random.Random(seed).choice((TURN, *PHASES))

    def make(self, rounds: Rounds, client: str, turn: ClientTurn, received: int) -> Kept | None:
        """A client's vector of a round; None, noted, where its update is none that may be averaged."""
        setup, round = self.sites.setup, rounds.round
        try:
            state = self.sites.roster[client]
            about = (setup.fingerprint, client, round, state.digest, turn.payload)
            noise = noise_for_sum(setup.job.secure, self.sites.noise_key, *about)
            vector, rounding = make_vector(setup.job, state, client, turn.payload, round, noise)
        except FedloomError as error:
            rounds.note(round, f"client {client} refused: {error}", "refused")
            return None
        if said := rounding.describe():
            rounds.note(round, f"client {client}: the grid of the secure sum is unfit: {said}")
        steps = 0 if setup.config.training_of(client).max_steps is None else turn.trained.steps
        rounds.folder.ledger.append(hidden_training(round, client, steps, turn.trained.seconds))
        return Kept(vector, turn.state.memory, received)

    def identity(self, client: str) -> Ed25519PrivateKey:
        """The lasting key of a client."""
        if client not in self.identities:
            self.identities[client] = Ed25519PrivateKey.generate()
        return self.identities[client]


class Seats:
    """The members of one sum. leaving: client → the phase from which on it is silent."""

    def __init__(
        self, secret: SecretSites, rounds: Rounds, kept: Mapping[str, Kept], leaving: Mapping[str, str]
    ) -> None:
        self.secret, self.rounds, self.kept, self.leaving = secret, rounds, kept, leaving
        self.taken: dict[str, Participant] = {}
        self.values = count_values(secret.sites.setup.job, rounds.server, rounds.round)

    def ask(self, phase: Phase, messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """Hand each client what it is sent; the replies of those that are there."""
        for client, message in messages.items():
            record_message(self.rounds, client, phase, "down", message)
            if self.leaving.get(client) == phase:
                self.rounds.note(self.rounds.round, f"client {client} dropped out of the secure sum ({phase})")
                continue
            if phase == "announce":
                self.taken[client] = self.seat(client, Invitation.read(message))
            reply = self.taken[client].answer(phase, message)
            record_message(self.rounds, client, phase, "up", reply)
            if phase == "mask":
                self.rounds.observer.client_finished(
                    self.rounds.round, client, float("nan"), len(reply), self.kept[client].received
                )
            yield client, reply

    def seat(self, client: str, invitation: Invitation) -> Participant:
        """A client in this sum."""
        secure = self.secret.sites.setup.job.secure
        assert secure is not None
        bits = secure.grid.bits
        return Participant(
            client,
            self.secret.identity(client),
            invitation,
            job=name_sum(JOB, "", self.rounds.server),
            round=self.rounds.round,
            values=self.values,
            bits=bits,
            least=secure.threshold_of(len(invitation.keys)),
            vector=lambda: unpack_vector(self.kept[client].vector, self.values, bits, f"the vector of {client}"),
        )
