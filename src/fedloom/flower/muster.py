"""Before the first round: the sites come in, and whoever does not is named."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedloom.errors import RoundError
from fedloom.flower.fleet import Fleet
from fedloom.flower.gathering import POLL_SECONDS
from fedloom.flower.messages import Reply
from fedloom.records.config import FlowerSettings

QUIET_SECONDS = 2.0
"""Between two calls of `looked` while sites come in: often all of them are there by then."""


def muster_sites(
    fleet: Fleet, rules: FlowerSettings, take: Callable[[Reply], object], looked: Callable[[], None]
) -> None:
    """Wait until every site has said hello; go on without some at the deadline, or after a grace without news.

    take(reply) is called for every reply, looked() now and then and at the end. Raises RoundError, which says of each
    site that is missing why, if there are too few.
    """
    until, noted = time.monotonic() + rules.deadline, time.monotonic()
    while time.monotonic() < until and not set(fleet.expected) <= fleet.names.keys():
        fleet.look()
        time.sleep(POLL_SECONDS)
        for reply in fleet.collect():
            take(reply)
            if rules.grace is not None and len(fleet.names) >= rules.min_replies:
                until = min(until, time.monotonic() + rules.grace)
        if time.monotonic() - noted >= QUIET_SECONDS:
            noted = time.monotonic()
            looked()
    looked()
    if len(fleet.names) < rules.min_replies:
        raise RoundError(
            f"{len(fleet.names)} of {len(fleet.expected)} sites are there after {rules.deadline:g} s, "
            f"flower.min_replies is {rules.min_replies} ({explain_missing(fleet)}): run `fedloom federation doctor` at "
            "the sites"
        )


def explain_missing(fleet: Fleet) -> str:
    """Why each missing site is not there, and which nodes were turned away that are none of them."""
    missing = {site: fleet.explain_absence(site) for site in sorted(fleet.expected)}
    told = [f"client {site}: {reason}" for site, reason in missing.items() if reason]
    others = {stranger.text for stranger in fleet.strangers.values() if stranger.site not in missing}
    return "; ".join([*told, *sorted(others)])
