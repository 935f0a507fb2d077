"""Who took part: how far clients drift apart, who answered in which round and who failed and why, sites on and off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from fedloom.records.ledger import Aggregation, Note, Presence, Roll, Row, Training, Transfer
from fedloom.records.text import to_printable
from fedloom.report.page.charts import Axis, Chart, Series, number
from fedloom.report.page.model import Block, Section, Table
from fedloom.report.page.run import PageRun, Variant
from fedloom.report.sampling import MOST, sample, say_sampled

MOST_LINES = 12
"""Clients with a line of their own."""
MOST_CELLS = 40, 60
"""Clients and rounds of the map of attendance: as many as can be told apart on a phone."""
STATES = ("not asked", "waited for", "answered", "late", "failed")
_ROUND = Axis("round", whole=True)


def describe_sites(run: PageRun) -> Section:
    """Charts and tables of one run's clients."""
    blocks = [*_losses(run.rows), *_norms(run.rows), *_agreement(run.rows), *_attendance(run), *_failures(run.rows)]
    return Section("clients", "Clients", [*blocks, *_presence(run.rows)])


def compare_drift(variants: Sequence[Variant]) -> Section | None:
    """How far the clients of several variants drift apart."""
    charts: list[Block] = []
    for key, title, note, axis in _DRIFTS:
        series = []
        for variant in variants:
            found: dict[int, list[float]] = {}
            for run in variant.runs:
                for round, value in _drift(run.rows, key).items():
                    found.setdefault(round, []).append(value)
            points = [(round, number(fmean(values))) for round, values in sorted(found.items())]
            if points:
                series.append(Series(variant.name, sample(points), variant.slot))
        if series:
            charts.append(Chart(f"drift-{key}", "lines", title, _ROUND, axis, series, note))
    return Section("clients", "Drift between clients", charts) if charts else None


_DRIFTS = (
    (
        "agreement",
        "How much clients agree",
        "Cosine between a client's update and the mean of all, on the mean over clients: 1 where all change the same.",
        Axis("agreement", high=1),
    ),
    (
        "spread",
        "Spread of training losses",
        "Standard deviation over the clients of a round.",
        Axis("nats a token", low=0),
    ),
)


def _drift(rows: Sequence[Row], key: str) -> dict[int, float]:
    """Round → the value; of those in which it was taken."""
    if key == "agreement":
        found = {row.round: row.agreement for row in rows if isinstance(row, Aggregation)}
        return {round: value for round, value in found.items() if value is not None and math.isfinite(value)}
    losses: dict[int, list[float]] = {}
    for row in rows:
        if isinstance(row, Training) and math.isfinite(row.loss):
            losses.setdefault(row.round, []).append(row.loss)
    return {
        round: math.sqrt(fmean((loss - fmean(them)) ** 2 for loss in them))
        for round, them in losses.items()
        if len(them) > 1
    }


def _lines(by_client: Mapping[str, Sequence[tuple[int, float]]]) -> list[Series]:
    """A thin line for every client, the mean in bold; of many clients the mean, the lowest and the highest alone."""
    by_round: dict[int, list[float]] = {}
    for points in by_client.values():
        for round, value in points:
            if math.isfinite(value):
                by_round.setdefault(round, []).append(value)
    rounds = sample(sorted(by_round))
    if not rounds:
        return []
    mean = [(round, number(fmean(by_round[round]))) for round in rounds]
    if len(by_client) > MOST_LINES:
        ends = [(r, number(fmean(by_round[r])), number(min(by_round[r])), number(max(by_round[r]))) for r in rounds]
        return [Series("mean; band: lowest to highest", ends, -1, "bold")]
    shown = [
        Series(to_printable(client), [(r, number(v)) for r, v in sample(points)], slot, "thin")
        for slot, (client, points) in enumerate(sorted(by_client.items()))
    ]
    return [Series("mean", mean, -1, "bold"), *shown]


def _losses(rows: Sequence[Row]) -> list[Block]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if isinstance(row, Training):
            found.setdefault(row.client, []).append((row.round, row.loss))
    series = _lines(found)
    title, y = "Training loss by client", Axis("nats a token")
    return [Chart("client-losses", "lines", title, _ROUND, y, series)] if series else []


def _norms(rows: Sequence[Row]) -> list[Block]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if isinstance(row, Aggregation):
            for client, norm in row.norms.items():
                found.setdefault(client, []).append((row.round, norm))
    series, note = _lines(found), "√Σ v² of all values that a client sent in a round: how far it moves."
    title, y = "Size of a client's update", Axis("norm", low=0)
    return [Chart("client-norms", "lines", title, _ROUND, y, series, note)] if series else []


def _agreement(rows: Sequence[Row]) -> list[Block]:
    key, title, note, axis = _DRIFTS[0]
    points = [(round, number(value)) for round, value in sorted(_drift(rows, key).items())]
    series = [Series("mean over clients", sample(points), 0, "bold")]
    return [Chart("drift-agreement", "lines", title, _ROUND, axis, series, note)] if points else []


def attend(rows: Sequence[Row]) -> dict[int, dict[str, str]]:
    """Round → client → one of STATES, of those that were asked.

    A roll decides where there is one. Otherwise whoever was sent something was asked, and whoever trained was too.
    """
    found: dict[int, dict[str, str]] = {}
    closed: set[int] = set()
    for row in rows:
        states = found.setdefault(getattr(row, "round", 0), {})
        if isinstance(row, Transfer) and not (row.delivery or row.undone or row.round in closed or row.round < 1):
            if row.kind.startswith("sum:"):  # talk beside an update: it asks for none and is none
                continue
            if row.direction == "up":
                states[row.client] = "answered"
            else:
                states.setdefault(row.client, "waited for")
        elif isinstance(row, Roll):
            states |= dict.fromkeys(row.answered, "answered")
            states |= dict.fromkeys(row.late, "late") | dict.fromkeys(row.failed, "failed")
        if isinstance(row, Roll | Aggregation):
            closed.add(row.round)
    for round in closed:
        found[round] = {c: "failed" if state == "waited for" else state for c, state in found[round].items()}
    return {round: states for round, states in sorted(found.items()) if states}


def _attendance(run: PageRun) -> list[Block]:
    """A map of clients and rounds."""
    found = attend(run.rows)
    clients = sorted({client for states in found.values() for client in states} | set(run.report.run.clients))
    if not found or not clients:
        return []
    most_clients, most_rounds = MOST_CELLS
    shown, rounds = sample(clients, most_clients), sample(list(found), most_rounds)
    cells = [
        (x, y, STATES.index(found[round].get(client, STATES[0])))
        for x, round in enumerate(rounds)
        for y, client in enumerate(shown)
    ]
    note = " ".join(
        f"{most} of {count:,} {what} are shown, at even distances; the ledger has all of them."
        for what, count, most in (("clients", len(clients), most_clients), ("rounds", len(found), most_rounds))
        if count > most
    )
    chart = Chart(
        "attendance",
        "heat",
        "Who answered",
        Axis("round", names=[str(round) for round in rounds]),
        Axis("client", names=[to_printable(client) for client in shown]),
        [Series("", cells)],
        note,
        Axis("", names=STATES),
    )
    counts = {client: dict.fromkeys(STATES, 0) for client in clients[:MOST]}
    for states in found.values():
        for client, state in states.items():
            if client in counts:
                counts[client][state] += 1
    rows = [(client, *(str(told[state]) for state in STATES[2:])) for client, told in counts.items()]
    more = say_sampled("clients", len(clients), "by name")
    head = ("client", *STATES[2:])
    return [chart, Table("attended", "Rounds of every client", head, rows, more, folded=len(rows) > 12)]


def _failures(rows: Sequence[Row]) -> list[Block]:
    """Who failed, was late or was refused, and why; the newest first."""
    found: list[tuple[str, str, str, str]] = []
    for row in rows:
        if isinstance(row, Roll):
            for what, told in (("failed", row.failed), ("late", row.late)):
                found += [(str(row.round), client, what, reason) for client, reason in told.items()]
        elif isinstance(row, Note) and row.about:
            found.append((str(row.round), "", row.about, row.text))
    if not found:
        return []
    note = say_sampled("failures", len(found), "the newest")
    head = ("round", "client", "what", "why")
    return [Table("failures", "Failures", head, found[: -MOST - 1 : -1], note, words=True)]


def _presence(rows: Sequence[Row]) -> list[Block]:
    """Which sites could be asked, and when that changed."""
    told = [row for row in rows if isinstance(row, Presence)]
    if not told:
        return []
    last = told[-1]
    sites = sorted({*last.online, *last.missing})
    now = [(site, "off" if site in last.missing else "on", last.missing.get(site, "")) for site in sites[:MOST]]
    changes: list[tuple[str, str, str, str]] = []
    before: dict[str, str] = {}
    for row in told:
        state = dict.fromkeys(row.online, "on") | dict.fromkeys(row.missing, "off")
        changes += [
            (str(row.round), site, held, row.missing.get(site, ""))
            for site, held in sorted(state.items())
            if before.get(site, held) != held
        ]
        before = state
    blocks: list[Block] = [Table("sites", "Sites now", ("site", "state", "why"), now, words=True)]
    if changes:
        note = say_sampled("changes", len(changes), "the newest")
        head = ("round", "site", "went", "why")
        blocks.append(Table("changes", "Sites on and off", head, changes[: -MOST - 1 : -1], note, words=True))
    return blocks
