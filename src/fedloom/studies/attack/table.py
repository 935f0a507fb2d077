"""What came of the attacks: loss and points lost against all honest, who was refused, how often a backdoor opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from rich import box
from rich.table import Table

from fedloom.records.ledger import Evaluation, Note, Training, read_rows
from fedloom.report.numbers import interval
from fedloom.studies.attack.malicious import ABSENT, result_of
from fedloom.studies.attack.plan import HONEST, Case, honest_domains
from fedloom.studies.compare import Trial


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line. loss: held-out, nats a token, and score: exact match in points, on what honest sites teach, means over
    seeds; nats_lost, lost: of both, against all honest without a defence on equal seeds, each with the half-width of
    its 95 % interval, 0 for one seed; worst: the most that one of these domains has lost, in points.

    refused: share of the malicious sites' updates that were refused; wronged: of the honest ones'. backdoor: share of
    held-out examples with the trigger that get its answer.
    """

    attack: str
    defended: bool
    rank: int | None
    loss: float
    score: float
    nats_lost: float
    nats_lost_half: float
    lost: float
    lost_half: float
    worst: float
    refused: float
    wronged: float
    backdoor: float | None


def read_outcomes(cases: Sequence[Case]) -> list[Outcome]:
    """The outcomes of finished runs, in the order of the cases."""
    found = []
    for case in cases:
        first = next(one for one in cases if (one.attack, one.defended, one.rank) == (HONEST, False, case.rank))
        (nats, points), (honest_nats, honest_points) = _ends(case), _ends(first)
        sent = [_refusals(trial, case.sites) for trial in case.trials]
        opened = [result_of(trial.folder)["backdoor"] for trial in case.trials]
        nats_lost, lost = _apart(nats, honest_nats), _apart(honest_points, points)
        found.append(
            Outcome(
                case.attack or "honest",
                case.defended,
                case.rank,
                fmean(map(fmean, nats)),
                fmean(map(fmean, points)),
                *interval([fmean(seed) for seed in nats_lost]),
                *interval([fmean(seed) for seed in lost]),
                max(fmean(domain) for domain in zip(*lost, strict=True)),
                _share(*(sum(one[k] for one in sent) for k in (0, 1))),
                _share(*(sum(one[k] for one in sent) for k in (2, 3))),
                None if None in opened else fmean(one for one in opened if one is not None),
            )
        )
    return found


Ends = list[list[float]]
"""Of every seed, a value of every domain."""


def _apart(ones: Ends, others: Ends) -> Ends:
    """By how much the first are larger, on equal seeds."""
    return [[a - b for a, b in zip(one, other, strict=True)] for one, other in zip(ones, others, strict=True)]


def _ends(case: Case) -> tuple[Ends, Ends]:
    """(loss, points of exact match) after the last round; without malicious sites' own domains."""
    runs = []
    for trial in case.trials:
        rows = [row for row in read_rows(trial.folder / "ledger.jsonl") if isinstance(row, Evaluation)]
        last = {row.domain: row for row in rows if row.round == max(one.round for one in rows)}
        runs.append([last[domain] for domain in sorted(honest_domains(last, case.sites))])
    return [[row.loss for row in run] for run in runs], [[100.0 * row.exact_match for row in run] for run in runs]


def _refusals(trial: Trial, sites: Sequence[str]) -> tuple[int, int, int, int]:
    """(updates of malicious sites that were refused, all of theirs; the same of honest ones)."""
    rows = read_rows(trial.folder / "ledger.jsonl")
    refused, sent = [0, 0], [0, 0]
    for row in rows:
        if isinstance(row, Note) and row.about == "refused":
            refused[row.text.split(" ", 2)[1] not in sites] += 1
        if isinstance(row, Training):
            sent[row.client not in sites] += 1
    return refused[0], sent[0], refused[1], sent[1]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _half(width: float | None, digits: int) -> str:
    """What follows a mean over several seeds."""
    return f" ± {width:.{digits}f}" if width else ""


def as_json(outcomes: Sequence[Outcome], sites: Sequence[str], clients: int) -> dict[str, object]:
    """The outcomes as JSON has them, and how many sites of how many were malicious."""
    return {
        "clients": clients,
        "malicious": list(sites),
        "rows": [{k: None if v is None or v != v else v for k, v in asdict(one).items()} for one in outcomes],
    }


def outcome_tables(result: Mapping[str, object]) -> list[Table]:
    """The tables on the terminal: what was lost, and who was found."""
    rows, sites = result["rows"], result["malicious"]
    assert isinstance(rows, list) and isinstance(sites, list)
    lost = _begin_table(f"{len(sites)} of {result['clients']} sites malicious ({', '.join(sites)}): what was lost")
    for name in ("loss", "nats lost", "score", "points lost", "worst domain"):
        lost.add_column(name, justify="right", no_wrap=True)
    found = _begin_table("Who was found")
    for name in ("liars refused", "honest refused", "backdoor"):
        found.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        rank = "" if row["rank"] is None else f", rank {row['rank']}"
        case = f"{row['attack']}{rank}", "on" if row["defended"] else "off"
        lost.add_row(
            *case,
            f"{row['loss']:.3f}",
            f"{row['nats_lost']:+.3f}{_half(row['nats_lost_half'], 3)}",
            f"{row['score']:.1f}",
            f"{row['lost']:+.1f}{_half(row['lost_half'], 1)}",
            f"{row['worst']:+.1f}",
        )
        found.add_row(
            *case,
            "" if row["attack"] in {"honest", ABSENT} else f"{row['refused']:.0%}",
            f"{row['wronged']:.0%}",
            "" if row["backdoor"] is None else f"{row['backdoor']:.1%}",
        )
    return [lost, found]


def _begin_table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", collapse_padding=True)
    table.add_column("attack")
    table.add_column("robust", no_wrap=True)
    return table
