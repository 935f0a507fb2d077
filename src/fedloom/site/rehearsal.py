"""One turn at a desk without a server: really trained and really packed, measured, and thrown away.

It takes place in a folder of its own, which is removed afterwards. So nothing is kept, nothing is written to the site's
record, no ε is charged, and what the record has counted so far is not looked at.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass

from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.protocol import Fact, Request
from fedloom.wire import Description, describe

JOB = "0" * 16


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What would have left in the first round: its bytes, the payload's index, and the facts beside it. seconds: of all
    of it. payload: None under secure aggregation, where what leaves is as good as random without the others'.
    """

    payload: Description | None
    size: int
    facts: Mapping[str, Fact]
    seconds: float


def rehearse_turn(site: SiteConfig, settings: str, base: str) -> Rehearsal:
    """Play the first round of a job. settings: as the server would tell them.

    Raises PolicyRefusal with the whole reason where the site's policy does not let it through, and any other
    FedloomError that ends a turn.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedloom-preview-") as folder:  # for this user alone
        policy = site.policy.model_copy(update={"approve": "auto"})
        desk = Desk(site.model_copy(update={"state": folder, "policy": policy}))
        try:
            reply = desk.turn(Request("turn", JOB, settings, base, 1), [])
            hidden = desk.held.payload_bytes if desk.held and not reply.payloads else 0
        finally:
            desk.close()
    payload = describe(reply.payloads[0]) if reply.payloads else None
    facts = {name: fact for name, fact in reply.facts.items() if payload or name in ("steps", "seconds")}
    return Rehearsal(payload, payload.size if payload else hidden, facts, time.perf_counter() - began)
