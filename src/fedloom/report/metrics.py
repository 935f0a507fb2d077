"""A run as Prometheus reads it: the text format, for node_exporter's textfile collector or any file server.

Nothing but the ledger is needed, so every engine has it, and a resumed run goes on counting where it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import get_args

from fedloom.records.ledger import Row
from fedloom.records.session import EndStatus
from fedloom.records.text import distinct_name
from fedloom.report.numbers import MEAN
from fedloom.report.progress import Progress, latest_values

FILE = "metrics.prom"
"""Its name in a run's folder."""
UPDATED = "fedloom_last_update_timestamp_seconds"
MISSED = "fedloom_site_missed_rounds"
MOST_SITES = 1000
"""Clients up to which each has series of its own: six for each of 10,000 would be megabytes after every round, and more
than a monitor should take from one run."""
Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Metric:
    """One name with its samples: (labels, value)."""

    name: str
    kind: str
    help: str
    samples: Sequence[tuple[Labels, float]]

    def lines(self) -> Iterable[str]:
        """The text format, version 0.0.4."""
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} {self.kind}"
        for labels, value in self.samples:
            text = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
            yield f"{self.name}{{{text}}} {_number(value)}"


def prometheus_text(rows: Iterable[Row], run: str, now: float) -> str:
    """The whole file, from all rows of a run. Raises CheckpointError where they record no run."""
    return progress_text(Progress.of(rows), run, now)


def progress_text(progress: Progress, run: str, now: float) -> str:
    """The whole file. run: what the run is called, its folder's name; now: seconds since 1970.

    A run of more than `MOST_SITES` clients has no series by client, and its bytes in two sums. Raises CheckpointError
    where no row says what the run is.
    """
    base = {"run": run, "method": progress.run.method}
    planned, total, retries = progress.run.num_rounds, progress.transfers, progress.retries
    metrics = (
        *_standing(base, progress, now),
        Metric("fedloom_rounds_planned", "gauge", "Rounds that the run shall have.", [(base, planned)]),
        Metric("fedloom_rounds_done_total", "counter", "The last round that was aggregated.", [(base, progress.done)]),
        *_by_site(base, progress),
        Metric("fedloom_payloads_total", "counter", "Payloads sent either way.", [(base, total)]),
        Metric("fedloom_late_answers_total", "counter", "Updates that came too late.", [(base, progress.late)]),
        Metric("fedloom_retries_total", "counter", "Times that the missing were asked again.", [(base, retries)]),
        Metric("fedloom_notes_total", "counter", "Notes in the ledger: refusals, drop-outs.", [(base, progress.notes)]),
        *_scores(base, latest_values(progress)),
        Metric("fedloom_server_seconds_total", "counter", "Seconds of aggregation.", [(base, progress.server_seconds)]),
        Metric("fedloom_training_seconds_total", "counter", "Seconds of training.", [(base, progress.train_seconds)]),
    )
    return "\n".join(line for metric in metrics if metric.samples for line in metric.lines()) + "\n"


def _by_site(base: Labels, progress: Progress) -> list[Metric]:
    """What is told of every client, or of all of them together."""
    name, help = "fedloom_payload_bytes_total", "Bytes of payloads between server and clients."
    if len(progress.run.clients) > MOST_SITES:
        sums = (("up", progress.bytes_up), ("down", progress.bytes_down))
        return [Metric(name, "counter", help, [({**base, "direction": way}, float(size)) for way, size in sums])]
    tallies = progress.answers.counts()
    sent = [
        ({**base, "site": client, "direction": direction}, float(size))
        for client, both in sorted(progress.sent.items())
        for direction, size in zip(("up", "down"), both, strict=True)
    ]
    online = [({**base, "site": site}, float(not reason)) for site, reason in sorted(progress.online.items())]
    losses = [({**base, "site": client}, loss) for client, loss in sorted(progress.losses.items())]
    return [
        Metric(name, "counter", help, sent),
        Metric("fedloom_answers_total", "counter", "Updates that came in time.", _of(base, tallies, "answered")),
        Metric("fedloom_failures_total", "counter", "Rounds asked in vain.", _of(base, tallies, "missed")),
        Metric(MISSED, "gauge", "Rounds asked in vain since the last update came.", _of(base, tallies, "row")),
        Metric("fedloom_site_online", "gauge", "Whether the site is connected, 1 or 0.", online),
        Metric("fedloom_training_loss", "gauge", "Mean loss of a client's last training.", losses),
    ]


def renew_update(text: str, now: float) -> str:
    """The same file, written at another time: whoever wrote it still lives."""
    return re.sub(rf"(?m)^({UPDATED}{{.*}}) \S+$", rf"\1 {_number(now)}", text)


def _standing(base: Labels, progress: Progress, now: float) -> list[Metric]:
    """How the run stands, when that was so, and when certificates end."""
    end, session = progress.end, progress.session
    state = end.status if end else "running"
    states = [({**base, "state": name}, float(name == state)) for name in ("running", *get_args(EndStatus))]
    ends = {
        name: datetime.fromisoformat(time).timestamp() - now
        for name, time in (session.certificates if session else {}).items()
    }
    days = [({**base, "certificate": name}, math.floor(left / 86400)) for name, left in ends.items()]
    times = [({**base, "certificate": name}, now + left) for name, left in ends.items()]
    return [
        Metric("fedloom_run_state", "gauge", "How the run stands: 1 for one of the states, 0 for the others.", states),
        Metric(UPDATED, "gauge", "When the run was last known to live, seconds since 1970.", [(base, now)]),
        Metric("fedloom_certificate_days_left", "gauge", "Whole days until it ends, when this was written.", days),
        Metric("fedloom_certificate_end_timestamp_seconds", "gauge", "When it ends, seconds since 1970.", times),
    ]


_SCORES = {
    "exact_match": ("fedloom_exact_match", "Held-out exact match, 0 to 1, at the last evaluation."),
    "loss": ("fedloom_heldout_loss", "Held-out loss in nats a token at the last evaluation."),
    "bits_per_byte": ("fedloom_heldout_bits_per_byte", "Held-out loss in bits a byte of text at the last evaluation."),
}


def _scores(base: Labels, taken: Mapping[str, Mapping[str, float]]) -> list[Metric]:
    """A gauge for each of fedloom's own measures, and one for all others, with the measure as a label."""
    own = [
        Metric(name, "gauge", help, [({**base, "domain": domain}, value) for domain, value in _domains(taken.get(key))])
        for key, (name, help) in _SCORES.items()
    ]
    others = [
        ({**base, "domain": domain, "metric": key}, value)
        for key in taken
        if key not in _SCORES
        for domain, value in _domains(taken[key])
    ]
    return [*own, Metric("fedloom_heldout_metric", "gauge", "What evaluation.metrics asks for, 0 to 1.", others)]


def _domains(by_domain: Mapping[str, float] | None) -> list[tuple[str, float]]:
    return [(domain, value) for domain, value in (by_domain or {}).items() if domain != MEAN]


def _of(base: Labels, tallies: Mapping[str, object], key: str) -> list[tuple[Labels, float]]:
    return [({**base, "site": client}, float(getattr(tally, key))) for client, tally in sorted(tallies.items())]


def _escaped(text: str) -> str:
    """A label's value. Two clients stay two, or Prometheus would refuse the whole file."""
    return distinct_name(text).replace("\\", r"\\").replace('"', r"\"")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return f"{value:.0f}" if value == int(value) else repr(float(value))
