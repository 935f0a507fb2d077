"""The whole page of one run, or of several side by side, as plain data."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from pathlib import PurePath

from fedloom.errors import ConfigError
from fedloom.records.configfile import parse
from fedloom.records.text import LONG, to_printable
from fedloom.report.facts import human_seconds
from fedloom.report.measures import TRAINING_LOSS, list_measures
from fedloom.report.numbers import MEAN, human_bytes
from fedloom.report.page.layers import describe_layers
from fedloom.report.page.learning import describe_front, describe_learning, find_ends
from fedloom.report.page.model import Headline, Page, PageState, Section, Words
from fedloom.report.page.origin import (
    compare_origins,
    describe_answers,
    describe_notes,
    describe_origin,
)
from fedloom.report.page.run import PageRun, Variant, group_runs
from fedloom.report.page.sites import compare_drift, describe_sites
from fedloom.report.page.stages import compare_time, describe_time
from fedloom.report.page.traffic import compare_traffic, describe_traffic
from fedloom.report.spent import spent_by_client


def build_page(runs: Sequence[PageRun], version: str = "") -> Page:
    """The page of these runs. version: changes with what is shown; only a live page needs it."""
    state: PageState = "over" if all(run.is_over for run in runs) else "running"
    if len(runs) == 1:
        return _one(runs[0], state, version)
    return _several(runs, state, version)


def _one(run: PageRun, state: PageState, version: str) -> Page:
    report = run.report
    method = to_printable(report.run.method)
    sections = [
        *_alarm(run),
        describe_learning(group_runs([run])),
        describe_answers(report),
        describe_traffic(report, run.compared),
        describe_sites(run),
        describe_layers(run.rows),
        describe_time(run.rows),
        describe_notes(report),
        describe_origin(run),
    ]
    facts = f"{len(report.run.clients):,} clients, {report.run.num_rounds:,} rounds, seed {report.run.seed}"
    return Page(
        f"fedloom run: {method}",
        state,
        version,
        [section for section in sections if section and section.blocks],
        heading=method,
        subtitle=f"{facts}, base model {_short_model(report.run.model)}",
        status=_status(run),
        headlines=_headlines(run),
    )


def _several(runs: Sequence[PageRun], state: PageState, version: str) -> Page:
    variants = group_runs(runs)
    sections = [
        *(section for run in runs for section in _alarm(run)),
        describe_front(variants),
        describe_learning(variants),
        compare_traffic(variants),
        compare_drift(variants),
        compare_time(variants),
        compare_origins(variants),
    ]
    seeds = len({run.report.run.seed for run in runs})
    what = f"{len(variants)} variants" if len(variants) > 1 else f"{len(runs)} runs of {variants[0].name}"
    going = sum(not run.is_over for run in runs)
    return Page(
        f"fedloom: {what}",
        state,
        version,
        [section for section in sections if section and section.blocks],
        heading=f"{what[0].upper()}{what[1:]} side by side" if len(variants) > 1 else what,
        subtitle=f"{len(runs)} runs, {seeds} seed{'s' * (seeds > 1)}",
        status=f"{going} of {len(runs)} running" if going else "all over",
        headlines=_best(variants),
    )


def _best(variants: Sequence[Variant]) -> list[Headline]:
    """Who ended best, and who sent the fewest bytes for what."""
    measure, ends = find_ends(variants)
    if len(ends) < 2:
        return []
    unit = " %" if measure.unit == "%" else ""
    told = [(end, f"{end.mean:.{measure.digits}f}{unit}", human_bytes(end.sent)) for end in ends]
    top = (max if measure.higher else min)(told, key=lambda one: one[0].mean)
    least, most = (choose(told, key=lambda one: one[0].sent) for choose in (min, max))
    name = measure.name if unit else measure.title
    return [
        Headline(f"best {name}", top[1], f"{top[0].variant.name}, with {top[2]}"),
        Headline("fewest bytes", least[2], f"{least[0].variant.name}, {name} {least[1]}"),
        Headline("most bytes", most[2], f"{most[0].variant.name}, {name} {most[1]}"),
    ]


def _short_model(model: str) -> str:
    """The base model's name: of a folder, its last part."""
    return to_printable(PurePath(model).name if model.startswith(("/", ".", "~")) else model)


def _status(run: PageRun) -> str:
    """How it stands, in a word or two."""
    standing, end = run.standing, run.report.facts.end
    if standing is not None and not standing.is_over:
        return f"running, round {standing.rounds} of {standing.planned}"
    if standing is not None:
        return "ended without a word" if standing.state == "gone" else standing.state
    return end.status if end else "in progress"


def _alarm(run: PageRun) -> list[Section]:
    """In one loud paragraph, that the run came to nothing and why."""
    end = run.report.facts.end
    if end is None or end.status != "failed":
        return []
    text = f"This run failed: {to_printable(end.reason, LONG)}"
    ident = "failed-" + "".join(c if c.isalnum() else "-" for c in str(run.folder))[-60:]
    return [Section(ident, "", [Words(f"{ident}-why", text, alarm=True)])]


def _headlines(run: PageRun) -> list[Headline]:
    """The few numbers that say it all."""
    report = run.report
    found: list[Headline] = []
    measures = list_measures([report])
    for measure in measures[:2]:
        before, after = report.value(measure.key, at=0), report.value(measure.key)
        if math.isfinite(after):
            unit = " %" if measure.unit == "%" else ""
            name = measure.name if unit else measure.title
            found.append(Headline(name, f"{measure.show(after)}{unit}", f"at first {measure.show(before)}{unit}"))
    if not measures and report.training:
        last = report.training[-1].values[TRAINING_LOSS.key][MEAN]
        found.append(Headline(TRAINING_LOSS.title, TRAINING_LOSS.show(last)))
    sent, dense = report.totals.bytes, report.dense_bytes
    ways = f"{human_bytes(report.totals.bytes_up)} up, {human_bytes(report.totals.bytes_down)} down"
    found.append(Headline("sent in all", human_bytes(sent), ways))
    if sent and dense:
        found.append(Headline("of dense fp32", f"{100 * sent / dense:.1f} %", f"{dense / sent:.1f} × fewer"))
    found += _spent(run)
    end = report.facts.end
    if end is not None and end.seconds:
        found.append(Headline("took", human_seconds(end.seconds), f"{report.turns:,} turns of clients"))
    return found


def _spent(run: PageRun) -> list[Headline]:
    """The largest ε at example level of any client so far, where noise is on and its accountant is installed."""
    if "[training.dp]" not in run.settings:
        return []
    try:
        spent = spent_by_client(run.rows, parse(tomllib.loads(run.settings), "the settings of the run"))
    except ConfigError:  # no accountant here, or settings of another version
        return []
    if not spent:
        return []
    client = max(spent, key=lambda name: spent[name][0])
    epsilon, delta = spent[client]
    where = f"at example level, {to_printable(client)}, δ = {delta:.2g}"
    return [Headline("ε spent, the most", f"{epsilon:.3g}", where)]
