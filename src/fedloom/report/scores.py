"""Held-out scores in tables: of one run before and after, of several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from rich import box
from rich.table import Table
from rich.text import Text

from fedloom.records.text import cell
from fedloom.report.measures import EXACT_MATCH, TRAINING_LOSS, Measure, list_measures
from fedloom.report.numbers import MEAN, Report, interval

NO_SCORE = "Nothing is held out (data.heldout is not set), so there is no score."
Groups = Mapping[str, Sequence[Report]]
"""Label → its runs, one a seed."""


def score_table(report: Report) -> Table | Text:
    """Every measure by domain, before and after, the leading one first; in words where nothing was held out."""
    if not report.points:
        return Text(NO_SCORE)
    measures = _telling(list_measures([report]))
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Held-out scores, before → after (loss in nats a token{_nothing(measures)})",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("domain")
    for name in (_short(measures[0]), "change", *map(_short, measures[1:])):
        table.add_column(cell(name), justify="right")
    for domain in [*report.domains, MEAN]:
        table.add_row(cell(domain), *score_cells(report, measures, domain), style="bold" if domain == MEAN else "")
    return table


def score_title(reports: Sequence[Report], split: str) -> str:
    """What a table of several runs' scores is called. split: what they were taken on, "Held-out" or "Validation"."""
    measures = _telling(list_measures(reports))
    return f"{split} scores, mean over domains{_nothing(measures)}" if measures else NO_SCORE


def _telling(measures: Sequence[Measure]) -> list[Measure]:
    """Without exact match where it does not lead: it is 0 throughout there, and columns are dear."""
    return [measure for measure in measures if measure != EXACT_MATCH or measure == measures[0]]


def _nothing(measures: Sequence[Measure]) -> str:
    """What is to be said of exact match where it has no column."""
    return "" if EXACT_MATCH in measures else "; exact match is 0 throughout"


def score_head(measures: Sequence[Measure]) -> list[str]:
    """The heads of `score_cells`."""
    return [measures[0].title, "change", *(measure.title for measure in measures[1:])]


def score_cells(report: Report, measures: Sequence[Measure], domain: str) -> list[str]:
    """One domain: of the leading measure before, after and the change; of the others before and after."""
    pairs = [(m, report.value(m.key, domain, 0), report.value(m.key, domain)) for m in measures]
    texts = [f"{m.show(before)} → {m.show(after)}" for m, before, after in pairs]
    lead, before, after = pairs[0]
    return [texts[0], lead.show(after - before, "+"), *texts[1:]]


def score_rows(groups: Groups) -> list[dict[str, str]]:
    """One row a label: its scores, the difference to the first label, and the share of FedIT's gain.

    Means over seeds with 95 % intervals. Differences and shares are taken on equal seeds.
    """
    reports = [report for runs in groups.values() for report in runs]
    measures = _telling(list_measures(reports))
    if not measures:
        return [{"run": label, "seeds": str(len(runs)), **_trained(runs)} for label, runs in groups.items()]
    lead, first = measures[0], next(iter(groups))
    fedit = next((label for label in groups if label.partition(":")[0] == "fedit"), None)
    rows = []
    for label, runs in groups.items():
        row = {"run": label, "seeds": str(len(runs)), **_scored(runs, measures)}
        if len(groups) > 1:
            row[f"{lead.name} against the first"] = "" if label == first else _difference(runs, groups[first], lead)
        if fedit is not None and len(groups) > 1:
            row[f"of {fedit}'s gain"] = _share_of_gain(runs, groups[fedit], lead)
        rows.append(row)
    return rows


def _scored(runs: Sequence[Report], measures: Sequence[Measure]) -> dict[str, str]:
    """The leading measure halfway and at the end, the others at the end."""
    lead = measures[0]
    names = [_short(measure) for measure in measures]
    halves = {"halfway %" if lead == EXACT_MATCH else f"halfway {names[0]}": _halfway(runs, lead)}
    names[0] = "end %" if lead == EXACT_MATCH else names[0]
    ends = [over_seeds([report.value(m.key) for report in runs], m) for m in measures]
    return {**halves, **dict(zip(names, ends, strict=True))}


def _short(measure: Measure) -> str:
    """A head for a narrow column; the unit of a loss is nats a token everywhere."""
    return measure.name if measure.unit != "%" else f"{measure.name} %"


def _halfway(runs: Sequence[Report], measure: Measure) -> str:
    return over_seeds([report.value_at(measure.key, report.run.num_rounds // 2) for report in runs], measure)


def _trained(runs: Sequence[Report]) -> dict[str, str]:
    """Where nothing was held out: the mean training loss of the last round."""
    last = [report.training[-1].values[TRAINING_LOSS.key][MEAN] for report in runs if report.training]
    return {"training loss": over_seeds(last, TRAINING_LOSS) if last else "–"}


def over_seeds(values: Sequence[float], measure: Measure, sign: str = "") -> str:
    """Mean over seeds, with the half-width of its 95 % interval where there are several."""
    mean, half = interval(values)
    return f"{measure.show(mean, sign)} ± {measure.show(half)}" if len(values) > 1 else measure.show(mean, sign)


def _paired(runs: Sequence[Report], others: Sequence[Report]) -> list[tuple[Report, Report]]:
    """The runs of equal seeds."""
    by_seed = {report.run.seed: report for report in others}
    return [(report, by_seed[report.run.seed]) for report in runs if report.run.seed in by_seed]


def _difference(runs: Sequence[Report], first: Sequence[Report], measure: Measure) -> str:
    """Paired on equal seeds: what the seed does to both is not in it, so that it may tell apart what intervals of the
    means do not.
    """
    found = [one.value(measure.key) - other.value(measure.key) for one, other in _paired(runs, first)]
    return over_seeds(found, measure, "+") if found else "–"


def _share_of_gain(runs: Sequence[Report], fedit: Sequence[Report], measure: Measure) -> str:
    """The gain of these runs over that of FedIT, from the base model's score on, on equal seeds."""
    pairs = _paired(runs, fedit)
    gains = [[measure.gain(r.value(measure.key, at=0), r.value(measure.key)) for r in pair] for pair in pairs]
    if not gains:
        return "–"
    own, whole = (fmean(gain[index] for gain in gains) for index in (0, 1))
    # Where FedIT itself gains nothing there is no gain to have a share of.
    return f"{100 * own / whole:.1f} %" if whole > 0 and math.isfinite(own) else "–"
