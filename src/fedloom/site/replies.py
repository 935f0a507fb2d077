"""What a desk replies beside its payload: the facts of a turn, and errors as the site's policy lets them be told."""

from __future__ import annotations

import logging
import math
import secrets

from fedloom.errors import FedloomError, PolicyRefusal
from fedloom.rounds.turns import ClientTurn
from fedloom.site.config import SiteConfig
from fedloom.site.log_lines import MOST_LOGGED, quote_trace
from fedloom.site.places import Place
from fedloom.site.policy import text_for_server
from fedloom.site.protocol import SPOKEN, Fact, Parcel

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
    if place is not None and place.held is not None:
        said |= {"version": place.held.after.version, "digest": place.held.after.digest}
    return Parcel(said)


def facts_of(done: ClientTurn) -> dict[str, Fact]:
    """What the server is told of a turn that was trained."""
    trained = done.trained
    loss = trained.loss if math.isfinite(trained.loss) else None
    return {"loss": loss, "steps": trained.steps, "examples": trained.num_examples, "seconds": trained.seconds}
