"""How the model got better: every measure against rounds and against bytes, and where each variant ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.records.text import to_printable
from fedloom.report.curves import Stretch, over_seeds, points_of, shown_value
from fedloom.report.measures import EXACT_MATCH, TRAINING_LOSS, Measure, list_measures, list_pictured
from fedloom.report.numbers import MEAN, Report, interval
from fedloom.report.page.charts import Axis, Chart, Series, Style, Unit, number
from fedloom.report.page.model import Block, Section, Table
from fedloom.report.page.run import Variant
from fedloom.report.sampling import MOST, sample, say_sampled
from fedloom.report.scores import NO_SCORE, score_cells, score_head, score_rows

MOST_DOMAINS = 16
"""Domains that have a line of their own: more are a thicket."""
_KEYS = {"exact_match": "exact-match", "loss": "loss", "bits_per_byte": "bits", "training_loss": "training-loss"}
_ROUND = Axis("round", whole=True)
_BYTES = Axis("bytes sent so far, both ways", "bytes", low=0)


def describe_learning(variants: Sequence[Variant]) -> Section:
    """Charts and tables of the scores."""
    reports = [report for variant in variants for report in variant.reports]
    pictured = list_pictured(reports)
    measures = [*pictured, TRAINING_LOSS] if any(report.training for report in reports) else pictured
    alone = len(reports) == 1
    blocks: list[Block] = []
    for place, measure in enumerate(measures):
        key = _KEYS.get(measure.key, f"metric-{place}")  # a name of the user's is no part of an address
        blocks += _curves_alone(reports[0], measure, key) if alone else _curves(variants, measure, key)
    table = _domains(reports[0]) if alone else _ends(variants)
    return Section("learning", "Learning", [*blocks, *([table] if table else [])], _lead(reports, alone))


def _lead(reports: Sequence[Report], alone: bool) -> str:
    if not any(report.points for report in reports):
        return f"{NO_SCORE} The training loss is shown instead."
    if alone:
        count = reports[0].examples
        return f"Scores on {count:,} held-out examples." if count else "Scores on held-out examples."
    return "Scores on held-out examples, on the mean over domains. Lines are means over seeds, bands 95 % intervals."


def _pair(
    measure: Measure,
    key: str,
    by_round: Sequence[Series],
    by_bytes: Sequence[Series],
    note: str = "",
    log: bool = False,
) -> list[Block]:
    """The two charts of one measure."""
    held = measure.name if measure == TRAINING_LOSS else f"held-out {measure.name}"
    title = to_printable(held)
    percent = measure.unit == "%"
    scale = Axis(to_printable(measure.title), "%" if percent else "", low=0 if percent else None)
    if measure == EXACT_MATCH:
        scale = Axis(measure.title, "%", low=0, high=100)
    x = Axis(_BYTES.title, "bytes", log=True) if log else _BYTES
    return [
        Chart(f"{key}-rounds", "lines", f"{title} by round".capitalize(), _ROUND, scale, by_round, note),
        Chart(f"{key}-bytes", "lines", f"{title} against bytes".capitalize(), x, scale, by_bytes, note),
    ]


def _curves_alone(report: Report, measure: Measure, key: str) -> list[Block]:
    """One run: the mean in bold, every domain thin."""
    points = sample(points_of(report, measure))
    domains = report.domains[:MOST_DOMAINS] if measure != TRAINING_LOSS and len(report.domains) > 1 else []
    by_round, by_bytes = [], []
    for slot, domain in enumerate([MEAN, *domains], start=-1):
        ys = [number(shown_value(point, measure, domain)) for point in points]
        name = to_printable(domain if domains else measure.name)
        style: Style = "bold" if domain == MEAN else "thin"
        by_round.append(Series(name, [(p.round, y) for p, y in zip(points, ys, strict=True)], slot, style))
        by_bytes.append(Series(name, [(p.bytes, y) for p, y in zip(points, ys, strict=True)], slot, style))
    note = say_sampled("points of a line", len(points_of(report, measure)))
    return _pair(measure, key, by_round, by_bytes, note)


def _curves(variants: Sequence[Variant], measure: Measure, key: str) -> list[Block]:
    """Several runs: means over seeds with their intervals."""
    by_round, by_bytes = [], []
    for variant in variants:
        stretches = over_seeds(variant.reports, measure)
        shown = sample(stretches)
        several = len(variant.runs) > 1
        sent = [stretch for stretch in shown if stretch.bytes > 0]  # a logarithm needs a number
        by_round.append(Series(variant.name, [(s.round, *_band(s, several)) for s in shown], variant.slot))
        by_bytes.append(Series(variant.name, [(s.bytes, *_band(s, several)) for s in sent], variant.slot))
    return _pair(measure, key, by_round, by_bytes, log=True)


def _band(stretch: Stretch, several: bool) -> tuple[float | None, ...]:
    """The mean, and where there are several seeds the ends of its interval."""
    mean, half = stretch.mean, stretch.half
    return (number(mean), number(mean - half), number(mean + half)) if several else (number(mean),)


def _domains(report: Report) -> Table | None:
    """Every measure by domain, before and after."""
    measures = list_measures([report])
    if not measures:
        return None
    names = [*report.domains[:MOST], MEAN]
    rows = [(domain, *score_cells(report, measures, domain)) for domain in names]
    note = say_sampled("domains", len(report.domains), "by name")
    return Table("scores", "Held-out scores, before → after", ("domain", *score_head(measures)), rows, note, total=True)


def _ends(variants: Sequence[Variant]) -> Table | None:
    """Where each variant ended."""
    rows = score_rows({variant.name: variant.reports for variant in variants})
    if not rows:
        return None
    return Table("scores", "Where the runs ended", list(rows[0]), [list(row.values()) for row in rows])


@dataclass(frozen=True, eq=False, slots=True)
class End:
    """Where a variant ended: mean and half the interval of the leading measure, as it is shown; bytes of a run."""

    variant: Variant
    sent: float
    mean: float
    half: float


def find_ends(variants: Sequence[Variant]) -> tuple[Measure, list[End]]:
    """The leading measure, and where each variant ended in it; without those that have not sent or scored anything."""
    lead = (list_pictured([report for variant in variants for report in variant.reports]) or [TRAINING_LOSS])[0]
    ends: list[End] = []
    for variant in variants:
        sent = sum(report.totals.bytes for report in variant.reports) / len(variant.runs)
        values = [shown_value(points[-1], lead, MEAN) for r in variant.reports if (points := points_of(r, lead))]
        if sent and values and all(map(math.isfinite, values)):
            ends.append(End(variant, sent, *interval(values)))
    return lead, ends


def describe_front(variants: Sequence[Variant]) -> Section:
    """Score against bytes: who is better for fewer."""
    lead, ends = find_ends(variants)
    best = find_front([(end.sent, end.mean if lead.higher else -end.mean) for end in ends])
    dots = [
        Series(
            end.variant.name,
            [(end.sent, number(end.mean), number(end.mean - end.half), number(end.mean + end.half))],
            end.variant.slot,
        )
        for end in ends
    ]
    steps = sorted((ends[place].sent, number(ends[place].mean)) for place in best)
    front = Series("nobody is better for fewer bytes", steps, -1, "thin")
    unit: Unit = "%" if lead.unit == "%" else ""
    bars = any(len(end.variant.runs) > 1 for end in ends)
    chart = Chart(
        "front",
        "dots",
        f"{to_printable(lead.name)} at the end against bytes sent".capitalize(),
        Axis("bytes of the whole run, both ways", "bytes", log=True),
        Axis(to_printable(lead.title), unit),
        [*dots, *([front] if len(steps) > 1 else [])],
        f"{'Up' if lead.higher else 'Down'} and to the left is better. The thin line joins the runs that no other "
        f"beats in both{'; bars are 95 % intervals over seeds' if bars else ''}.",
    )
    return Section("front", "Score against bytes", [chart] if ends else [])


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points (cost, worth) of which no other costs no more and is worth more, or the reverse."""
    return [
        place
        for place, (cost, worth) in enumerate(points)
        if not any(
            other_cost <= cost and other_worth >= worth and (other_cost, other_worth) != (cost, worth)
            for other_cost, other_worth in points
        )
    ]
