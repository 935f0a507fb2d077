"""What a desk replies beside its payload: the facts of a turn, and errors as the site's policy lets them be told."""

from __future__ import annotations

import json
import logging
import math
import secrets
from contextlib import suppress

from fedloom.errors import FedloomError, PolicyRefusal
from fedloom.records.ledger import Row, Training
from fedloom.rounds.turns import ClientTurn
from fedloom.site.config import SiteConfig
from fedloom.site.log_lines import MOST_LOGGED, quote_trace
from fedloom.site.places import Place
from fedloom.site.policy import text_for_server
from fedloom.site.protocol import SPOKEN, Fact, Parcel
from fedloom.workspace.folder import transfer_row

log = logging.getLogger("fedloom.worker")


def reply_error(site: SiteConfig, error: Exception, place: Place | None) -> Parcel:
    """The reply where a request failed; the whole error goes to the log. place: of the job that was asked for."""
    reference = secrets.token_hex(4)
    trace = "" if isinstance(error, FedloomError) else quote_trace(error)
    level = logging.WARNING if isinstance(error, PolicyRefusal) else logging.ERROR
    log.log(level, "reference %s: %r%s", reference, str(error)[:MOST_LOGGED], trace)
    said: dict[str, Fact] = {
        "error": text_for_server(site.policy, error, reference),
        "protocol": SPOKEN.newest,
        "name": site.name,
    }
    with suppress(FedloomError, OSError):  # what was wrong has been said
        held = place.recall() if place is not None and (place.held or place.store.exists()) else None
        said |= {} if held is None else {"version": held.after.version, "digest": held.after.digest}
    return Parcel(said)


def facts_of(done: ClientTurn, *, secret: bool = False, counted: bool = False) -> bytes:
    """What the server is told of a turn that was trained, as JSON.

    secret: under secure aggregation, where it is told neither loss nor examples; counted: nor steps that follow from
    the number of examples.
    """
    trained = done.trained
    if secret:
        return json.dumps({"steps": 0 if counted else trained.steps, "seconds": trained.seconds}).encode()
    loss = trained.loss if math.isfinite(trained.loss) else None
    facts = {"loss": loss, "steps": trained.steps, "examples": trained.num_examples, "seconds": trained.seconds}
    return json.dumps(facts).encode()


class Rows:
    """What the site's ledger will say of a request, taken down while its payloads are at hand."""

    def __init__(self, round: int, site: str) -> None:
        self.round, self.site = round, site
        self.found: list[Row] = []

    def received(self, payload: bytes) -> None:
        """A payload of the server's was applied."""
        self.found.append(transfer_row(self.round, self.site, "down", payload))

    def sent(self, done: ClientTurn, *, hidden: bool = False) -> None:
        """A turn was trained, and its payload is to leave; hidden: as it is never, but as part of a sum."""
        one = done.trained
        self.found.append(Training(self.round, self.site, one.loss, one.steps, one.num_examples, one.seconds))
        if not hidden:
            self.found.append(transfer_row(self.round, self.site, "up", done.payload))
