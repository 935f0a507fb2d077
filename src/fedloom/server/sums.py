"""A round's secure sum at the server, whoever its sites are; and what of it stands in the ledger."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fedloom.errors import SecureSumError
from fedloom.records.ledger import Direction, Training, Transfer
from fedloom.records.rows import SUM_KINDS
from fedloom.rounds.secure import count_values, mean_update
from fedloom.rounds.sums import Secure
from fedloom.secagg import NONCE_BYTES, Invitation, Phase, play_sum
from fedloom.secagg.play import Ask
from fedloom.server.engine import Summed, Updates
from fedloom.server.journal import Journal

if TYPE_CHECKING:
    from fedloom.server.loop import Rounds


def collect_sum(
    rounds: Rounds, job: str, keys: Mapping[str, bytes], ask: Ask, journal: Journal | None = None
) -> Updates:
    """The sum of the updates of the sites that are ready; without one where too few are, or stay to the end.

    job: what the sites sign (`agreement.name_sum`). keys: site → its lasting public key, of those that
    have trained. journal: where the sum is kept, so that another process can go on with it; one that it has already is
    gone on with.
    """
    setup, round = rounds.setup, rounds.round
    secure = setup.job.secure
    assert secure is not None
    try:
        invitation = journal.invitation if journal else None
        if invitation is None:
            invitation = invite(secure, keys)
            if journal:
                journal.begin(invitation)
        ask = journal.keep(ask) if journal else ask
        values = count_values(setup.job, rounds.server, round)
        session = invitation.session(job, round, values, secure.grid.bits)
        found = play_sum(session, invitation, ask, refuser(rounds))
        update = mean_update(setup.job, rounds.server, found.total, len(found.sites), round)
    except SecureSumError as error:
        return Updates({}, skipped=f"there is no secure sum of this round: {error}. The round is skipped")
    for site in found.liars:
        rounds.note(round, f"client {site} has opened wrong shares; the others' made up for them", "refused")
    return Updates({}, summed=Summed(update, found.sites))


def invite(secure: Secure, keys: Mapping[str, bytes]) -> Invitation:
    """To a new sum of the sites that are ready. Raises SecureSumError where they are too few."""
    threshold = secure.threshold_of(len(keys))
    if threshold > len(keys):
        raise SecureSumError(
            f"{len(keys)} site{'s are' if len(keys) != 1 else ' is'} ready, {threshold} are needed "
            f"(privacy.least_cohort is {secure.least_cohort})"
        )
    return Invitation(secrets.token_bytes(NONCE_BYTES), threshold, dict(sorted(keys.items())))


def refuser(rounds: Rounds) -> Callable[[str, str], None]:
    """Notes who was refused in a sum, and why."""

    def refuse(site: str, reason: str) -> None:
        rounds.note(rounds.round, f"client {site} refused: {reason}", "refused")

    return refuse


def record_message(rounds: Rounds, site: str, phase: Phase, direction: Direction, message: bytes) -> None:
    """A message of a sum, as a row of the ledger."""
    kind = SUM_KINDS[phase][direction == "down"]
    part = "values" if kind == "masked" else "secure_sum"
    rounds.folder.ledger.append(Transfer(rounds.round, site, direction, kind, len(message), {part: len(message)}))


def hidden_training(round: int, client: str, steps: int, seconds: float) -> Training:
    """What the server knows of a training under secure aggregation: neither its loss nor its examples."""
    return Training(round, client, math.nan, steps, 0, seconds)
