"""A site's part in the secure sums of its jobs: its lasting key, the other sites' keys, and which vectors have left.

<state folder>/secure.key           the private key by which other sites know this one, made where it is missing
<state folder>/peers.json           the other sites' public keys as they were first told, where SITE.toml names none
<state folder>/jobs/<job>/sums      a line for each vector that left under masks: its round, and what it rests on

A vector leaves once. Of two sums that it is in, a server could take the difference, and with all others in both that
is another site's vector. So a site is in no second sum with the same vector, whatever became of the first.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedloom.errors import SecureSumError, SiteError
from fedloom.filed import in_memory
from fedloom.methods.method import State
from fedloom.records.text import to_printable
from fedloom.rounds.agreement import name_sum
from fedloom.rounds.secure import count_values, make_vector
from fedloom.rounds.turns import ClientTurn
from fedloom.secagg import Invitation, Participant, unpack_vector
from fedloom.site.audit import AuditTrail
from fedloom.site.config import SiteConfig
from fedloom.site.places import Place
from fedloom.site.policy import check_bytes
from fedloom.site.protocol import Fact, Request
from fedloom.site.replies import facts_of
from fedloom.site.store import TurnRecord
from fedloom.workspace.assemble import Setup
from fedloom.workspace.private import noise_for_sum

log = logging.getLogger("fedloom.worker")

KEY, PEERS, SPENT = "secure.key", "peers.json", "sums"


@dataclass(frozen=True, eq=False, slots=True)
class Seat:
    """The site in one sum. It lives in memory alone: a site that is started anew has left the sum."""

    round: int
    invited: bytes
    participant: Participant


class Sums:
    """The sums that a site takes part in, one of each job at most."""

    def __init__(self, site: SiteConfig, trail: AuditTrail) -> None:
        self.site = site
        self.trail = trail
        self.folder = Path(site.state)
        self._seats: dict[str, Seat] = {}

    def ready(self, place: Place, held: TurnRecord) -> dict[str, Fact]:
        """What the server is told of a vector that waits: the site's key, and whether it has left already."""
        identity = load_identity(self.folder).public_key().public_bytes_raw()
        return {"key": identity.hex(), "spent": is_spent(place.store.folder, held)}

    def answer(self, asked: Request, place: Place, held: TurnRecord, message: bytes) -> bytes:
        """The reply to a message of a sum. The masked vector is recorded before it goes.

        Raises SecureSumError for whatever a sum must not be, SiteError where there is no vector for it, PolicyRefusal
        where the site lets no more bytes out.
        """
        if held.round != asked.round or not held.payload_bytes:
            raise SiteError(f"asked for a sum of round {asked.round}, of which this site has no vector")
        if asked.phase == "announce":
            self._sit_down(asked, place, held, message)
        seat = self._seats.get(asked.job)
        if seat is None or seat.round != asked.round or asked.phase is None:
            raise SecureSumError(
                f"site {self.site.name!r} is in no sum of round {asked.round}: it was not invited, or its worker was "
                "started anew since"
            )
        reply = seat.participant.answer(asked.phase, message)
        if asked.phase == "mask":
            self._let_go(asked, place, held, reply)
        return reply

    def _let_go(self, asked: Request, place: Place, held: TurnRecord, masked: bytes) -> None:
        """Have it on disk that a masked vector leaves."""
        check_bytes(self.site.policy, len(masked), self.trail.count_spent(asked.job, asked.round))
        mu = self.site.policy.privacy.mu if self.site.policy.privacy else None
        secure = place.setup.job.secure
        cost = None
        if secure is not None and secure.noise is not None:
            cost = secure.noise.cost(secure.grid.step, count_values(place.setup.job, held.before, asked.round))
        self.trail.record(masked, asked.job, asked.round, mu, charge=held.charge or None, summed=cost)
        spend(place.store.folder, held)

    def _sit_down(self, asked: Request, place: Place, held: TurnRecord, message: bytes) -> None:
        """Take a seat in the sum that the site is invited to, unless it has it already."""
        seat = self._seats.get(asked.job)
        if seat is not None and (seat.round, seat.invited) == (asked.round, message):
            return
        if is_spent(place.store.folder, held):
            raise SecureSumError(
                f"the vector of site {self.site.name!r} of round {asked.round} has left in a sum already: in a second "
                "one it could be told from the others'"
            )
        invitation = Invitation.read(message)
        job, participants = place.setup.job, place.setup.config.federation.participants or ()
        strangers = sorted(invitation.keys.keys() - set(participants))
        if strangers:
            raise SecureSumError(f"{to_printable(strangers[0], 80)!r} is invited, which takes no part in this run")
        check_peers(self.site, invitation.keys)
        assert job.secure is not None
        values, bits = count_values(job, held.before, asked.round), job.secure.grid.bits
        least = max(job.secure.threshold_of(len(invitation.keys)), self.site.policy.least_cohort or 0)
        participant = Participant(
            self.site.name,
            load_identity(self.folder),
            invitation,
            job=name_sum(asked.job, asked.settings, held.before),
            round=asked.round,
            values=values,
            bits=bits,
            least=least,
            vector=lambda: unpack_vector(place.store.read_payload(), values, bits, "the site's own vector"),
        )
        self._seats[asked.job] = Seat(asked.round, message, participant)


def hide_turn(setup: Setup, site: str, state: State, done: ClientTurn, round: int) -> tuple[bytes, bytes]:
    """(what the server is told of a turn, the vector that is to be added up with the other sites').

    state: that the turn began with.
    """
    about = (setup.fingerprint, site, round, state.digest, in_memory(done.payload))
    noise = noise_for_sum(setup.job.secure, setup.secret, *about)
    vector, rounding = make_vector(setup.job, state, site, done.payload, round, noise)
    if said := rounding.describe():
        log.warning("round %d: the grid of the secure sum is unfit: %s", round, said)
    return facts_of(done, secret=True, counted=setup.config.training_of(site).max_steps is None), vector


def load_identity(folder: Path) -> Ed25519PrivateKey:
    """The site's lasting key, made and kept where there is none. Raises SiteError where the file is none."""
    path = folder / KEY
    with suppress(FileExistsError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "wb") as opened:
            opened.write(Ed25519PrivateKey.generate().private_bytes_raw())
            opened.flush()
            os.fsync(opened.fileno())
    held = path.read_bytes()
    if len(held) != 32:
        raise SiteError(f"{path} is no key: restore it, or remove it and tell the other sites your new one")
    return Ed25519PrivateKey.from_private_bytes(held)


def check_peers(site: SiteConfig, keys: Mapping[str, bytes]) -> None:
    """Raises SecureSumError unless the keys are the other sites': those of [peers] in SITE.toml, where it names any, or
    those that this site was told first, which it keeps.
    """
    path = Path(site.state) / PEERS
    remembered = read_peers(path)
    for name in sorted(keys.keys() - {site.name}):
        given = keys[name].hex()
        known = site.peers.get(name) if site.peers else remembered.get(name, given)
        if known is None:
            raise SecureSumError(f"site {name!r} is invited, of which [peers] of this site has no key")
        if known != given:
            source = "[peers] of this site" if site.peers else "the sum that this site was in before"
            raise SecureSumError(
                f"the server says another key of site {name!r} than {source}: ask that site for its key "
                f"(`fedloom site key`){'' if site.peers else f'; if it is new, take the old one out of {PEERS}'}"
            )
        remembered[name] = given
    if not site.peers and remembered != read_peers(path):
        log.info("keys of other sites, as the server told them first: %s", ", ".join(sorted(remembered)))
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(remembered, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(partial, path)


def read_peers(path: Path) -> dict[str, str]:
    """Site → its public key as it was told first. Raises SiteError where the file is none."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        held = None
    if not isinstance(held, dict) or not all(isinstance(key, str) for key in held.values()):
        raise SiteError(f"{path} is no list of keys: restore it, or remove it to trust the server's once more")
    return held


def spend(folder: Path, held: TurnRecord) -> None:
    """Have it on disk that the vector of a turn leaves now."""
    line = _line(held)
    with open(folder / SPENT, "ab+") as file:
        file.seek(0)
        if line not in file.read().splitlines():
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())


def is_spent(folder: Path, held: TurnRecord) -> bool:
    """Whether the vector of a turn has left."""
    try:
        return _line(held) in (folder / SPENT).read_bytes().splitlines()
    except FileNotFoundError:
        return False


def _line(held: TurnRecord) -> bytes:
    return f"{held.round} {held.before.version} {held.before.digest}".encode()
