"""A job, a rehearsal and a site in plain words, for `fedloom site`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from fedloom.report.numbers import human_bytes

if TYPE_CHECKING:
    from fedloom.site.config import SiteConfig
    from fedloom.site.dossier import Dossier, Noise
    from fedloom.site.overview import Overview
    from fedloom.site.rehearsal import Rehearsal

Row = tuple[str, str]
MOST_NAMES = 12
"""Names in one list; more say nothing more."""


def dossier_rows(here: SiteConfig, seen: Dossier, base: str) -> Iterator[Row]:
    """What a job is. base: the base model, in words."""
    yield "server", seen.server or "the one that this site's node connects to"
    yield "sites", _listed(seen.participants) or "not named"
    yield "base model", base
    yield "method", f"{seen.method}; an update holds {seen.sends}"
    yield "trains", _trained(seen)
    yield "rounds", f"{seen.rounds}; in each {_work(seen)}"
    yield "examples", _examples(here, seen)
    yield "leaves", _leaving(here, seen)
    yield "bytes", _bytes(here, seen)
    yield "secure sum", _sums(seen)
    if seen.least_cohort and seen.noise is None:
        yield (
            "noise at site level",
            "off: this site adds none of its own (docs/privacy.md says what that means)",
        )
    else:
        yield "noise at site level", _noise(seen.noise)
    yield "noise at example level", seen.protection
    for number, objection in enumerate(seen.objections):
        yield "" if number else "refused by policy", objection
    if not seen.objections:
        yield "policy", "has nothing against it"


def rehearsal_rows(played: Rehearsal, seen: Dossier) -> Iterator[Row]:
    """What a round that was played would have sent."""
    payload, facts = played.payload, {name: fact for name, fact in played.facts.items() if fact is not None}
    yield "played", f"one round in {played.seconds:.1f} s, with loading; thrown away: nothing kept, sent or charged"
    yield "would leave", f"{played.size:,} bytes in this round; about {human_bytes(seen.rounds * played.size)} in all"
    if payload is None:
        yield "in it", "a vector under masks, which says nothing without those of the other sites"
    else:
        values = sum(tensor.values for tensor in payload.tensors)
        yield "in it", f"{values:,} of {seen.values:,} numbers, for {len(payload.tensors)} factors"
    yield "beside it", ", ".join(f"{name} {_shown(fact)}" for name, fact in facts.items()) or "nothing"


def overview_rows(here: SiteConfig, seen: Overview) -> Iterator[Row]:
    """How a site stands."""
    yield "site", here.name
    yield "worker", f"running on {here.socket}" if seen.running else "not running: `fedloom worker SITE.toml` starts it"
    if seen.last is None:
        yield "last request", "none yet"
    else:
        last, busy = seen.last, seen.running and not seen.last.answered
        what = f"{last.ask} of job {last.job}, round {last.round}, {local_time(last.came)}"
        yield "at work on" if busy else "last request", what
    limit = here.policy.max_bytes_day
    yield "left today", f"{seen.bytes_day:,} bytes in 24 hours" + (f"; the policy allows {limit}" if limit else "")
    yield "left in all", f"{seen.updates} updates, {seen.bytes_all:,} bytes"
    if seen.epsilon is not None and here.policy.privacy is not None:
        most = here.policy.privacy.max_epsilon
        limit = f" of {most:g}" if most else ""
        yield "noise at site level", f"ε {seen.epsilon:.3g}{limit} spent, at δ = {seen.delta:g}"
    if seen.examples:
        yield "noise at example level", seen.examples.partition(": ")[2]
    limit = here.policy.max_disk
    parts = f"{human_bytes(seen.disk_audit)} the record of what left, {human_bytes(seen.disk_jobs)} of {seen.jobs} jobs"
    yield "disk", f"{human_bytes(seen.disk)}: {parts}" + (f"; the policy allows {limit}" if limit else "")
    yield "waiting", _listed(seen.waiting) or "no job"


def local_time(text: str | None) -> str:
    """A time of the book, as the clock on the wall has it."""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M") if text else ""


def _trained(seen: Dossier) -> str:
    places = [f"{name} ({count})" if count > 1 else name for name, count in seen.modules.items()]
    low, high = seen.ranks
    rank = f"rank {high}" if low == high else f"ranks {low} to {high}"
    total = sum(seen.modules.values())
    return f"{rank} beside {total} modules of the base model, {seen.values:,} numbers: {_listed(places)}"


def _work(seen: Dossier) -> str:
    steps = f"{seen.steps} steps" if seen.steps else "steps that follow from the examples"
    epochs = f" ({seen.epochs:g} passes over the examples)" if seen.epochs else ""
    return f"{steps}{epochs} of {seen.batch} examples; {seen.optimizer}, learning rate {seen.learning_rate:g}"


def _examples(here: SiteConfig, seen: Dossier) -> str:
    if seen.examples is None:
        return f"cannot be read: {seen.trouble}"
    drawn = f"; a round uses {seen.drawn:,} of them, none twice before all were used" if seen.drawn else ""
    return f"{seen.examples:,} of this site may be used, but for those that are too long for the run{drawn}"


def _leaving(here: SiteConfig, seen: Dossier) -> str:
    if seen.least_cohort:
        return (
            f"the update within a sum of {seen.least_cohort} sites or more, of which the server sees the sum alone; "
            "steps, seconds, and this site's public key; no number of examples, no loss, no example, token or file name"
        )
    noisy = here.policy.privacy is not None or seen.protected
    hidden = here.policy.declared_examples is not None
    number = f"{seen.told:,} as the number of examples" if seen.told else "the number of examples"
    told = [
        "the update",
        f"{number}, declared" if hidden else number,
        "no loss, because of the noise" if noisy else "the mean loss",
        "no steps" if hidden and seen.epochs else "steps",
        "seconds",
    ]
    return f"{', '.join(told)}; no example, token or file name"


def _bytes(here: SiteConfig, seen: Dossier) -> str:
    most = f"at most {human_bytes(seen.bytes_round)} a round, {human_bytes(seen.bytes_all)} in all"
    limits = [
        f"{key} = {limit}" for key in ("max_bytes_round", "max_bytes_day") if (limit := getattr(here.policy, key))
    ]
    return f"{most}; usually far less (`fedloom site preview --train` measures it)" + (
        f"; the policy holds it to {', '.join(limits)}" if limits else ""
    )


def _sums(seen: Dossier) -> str:
    if not seen.least_cohort:
        return "off: the server sees this site's update by itself"
    return f"on: nobody sees the update of a single site; every sum is of {seen.least_cohort} sites or more"


def _noise(noise: Noise | None) -> str:
    if noise is None:
        return "off: whoever runs the server may be able to read examples out of an update (docs/privacy.md)"
    said = (
        f"on (σ = {noise.sigma:g}, C = {noise.clip_norm:g}): ε {noise.job:.3g} for this job, {noise.spent:.3g} spent "
        f"before, {noise.together:.3g} together, at δ = {noise.delta:g}"
    )
    if noise.most is None:
        return said
    stop = "" if noise.rounds is None else f", which is reached after {noise.rounds} more rounds of it"
    return f"{said}; nothing leaves beyond {noise.most:g}{stop}"


def _listed(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _shown(fact: object) -> str:
    return f"{fact:.4g}" if isinstance(fact, float) else str(fact)
