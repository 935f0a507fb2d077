"""What came of the attacks: loss and points lost against all honest, who was refused, how often a backdoor opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from rich import box
from rich.table import Table

from fedloom.records.ledger import Evaluation, Note, Training, read_rows
from fedloom.studies.attack.malicious import result_of
from fedloom.studies.attack.plan import HONEST, Case, honest_domains
from fedloom.studies.compare import Trial


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line. loss: held-out, nats a token, and score: exact match in points, on what honest sites teach, means over
    seeds; lost: points against all honest without a defence; worst: the most that one of these domains has lost.

    refused: share of the malicious sites' updates that were refused; wronged: of the honest ones'. backdoor: share of
    held-out examples with the trigger that get its answer.
    """

    attack: str
    defended: bool
    rank: int | None
    loss: float
    score: float
    lost: float
    worst: float
    refused: float
    wronged: float
    backdoor: float | None


def read_outcomes(cases: Sequence[Case]) -> list[Outcome]:
    """The outcomes of finished runs, in the order of the cases."""
    found = []
    for case in cases:
        first = next(one for one in cases if (one.attack, one.defended, one.rank) == (HONEST, False, case.rank))
        ends, held = _ends(case), _ends(first)
        lost = [held[domain][0] - ends[domain][0] for domain in held]
        sent = [_refusals(trial, case.sites) for trial in case.trials]
        opened = [result_of(trial.folder)["backdoor"] for trial in case.trials]
        found.append(
            Outcome(
                case.attack or "honest",
                case.defended,
                case.rank,
                fmean(loss for _, loss in ends.values()),
                fmean(points for points, _ in ends.values()),
                fmean(lost),
                max(lost),
                _share(*(sum(one[k] for one in sent) for k in (0, 1))),
                _share(*(sum(one[k] for one in sent) for k in (2, 3))),
                None if None in opened else fmean(one for one in opened if one is not None),
            )
        )
    return found


def _ends(case: Case) -> dict[str, tuple[float, float]]:
    """Domain → (points of exact match, loss) after the last round, means over seeds; without malicious sites' own."""
    runs = []
    for trial in case.trials:
        rows = [row for row in read_rows(trial.folder / "ledger.jsonl") if isinstance(row, Evaluation)]
        last = max(row.round for row in rows)
        runs.append({row.domain: (100.0 * row.exact_match, row.loss) for row in rows if row.round == last})
    domains = honest_domains(runs[0], case.sites)
    return {
        domain: (fmean(run[domain][0] for run in runs), fmean(run[domain][1] for run in runs)) for domain in domains
    }


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


def as_json(outcomes: Sequence[Outcome], sites: Sequence[str], clients: int) -> dict[str, object]:
    """The outcomes as JSON has them, and how many sites of how many were malicious."""
    return {
        "clients": clients,
        "malicious": list(sites),
        "rows": [{k: None if v is None or v != v else v for k, v in asdict(one).items()} for one in outcomes],
    }


def outcome_tables(result: Mapping[str, object]) -> list[Table]:
    """The table on the terminal."""
    rows, sites = result["rows"], result["malicious"]
    assert isinstance(rows, list) and isinstance(sites, list)
    title = f"{len(sites)} of {result['clients']} sites malicious ({', '.join(sites)})"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", collapse_padding=True)
    table.add_column("attack")
    table.add_column("robust", no_wrap=True)
    for name in ("loss", "score", "lost", "worst\ndomain", "liars\nrefused", "honest\nrefused", "backdoor"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        rank = "" if row["rank"] is None else f", rank {row['rank']}"
        table.add_row(
            f"{row['attack']}{rank}",
            "on" if row["defended"] else "off",
            f"{row['loss']:.3f}",
            f"{row['score']:.1f}",
            f"{row['lost']:+.1f}",
            f"{row['worst']:+.1f}",
            "" if row["attack"] == "honest" else f"{row['refused']:.0%}",
            f"{row['wronged']:.0%}",
            "" if row["backdoor"] is None else f"{row['backdoor']:.1%}",
        )
    return [table]
