"""Figures of runs that are gone, against today's baseline.

Shares of dense FedIT's bytes follow from the bytes that were sent, which a front.csv has, and from what dense FedIT
sends with the same attendance, for which nothing has to be trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from experiments.figures import SHARE, read_csv
from experiments.points import EXACT_MATCH, Point, Reference
from fedloom.records.configfile import load_config
from fedloom.report.baseline import FP32, play_rounds
from fedloom.server.attendance import draw_rounds
from fedloom.studies.estimate import Case, config_case


@dataclass(frozen=True, slots=True)
class Testbed:
    """Of a testbed's runs, means over seeds: turns, and the dense bytes. old: as they were counted until 2026-11-28.

    The old baseline had every turn once up and once down, at the client's own rank: no drop-outs, no delivery.
    """

    clients: int
    turns: float
    old: float
    new: Reference


def play_testbed(folder: Path, name: str, seeds: Sequence[int]) -> Testbed:
    """Attendance of a testbed's runs, as they will be or were."""
    case = config_case(load_config(folder / f"{name}.toml"))
    values = {client: _values(case, client) for client in case.ranks}
    turns, old, new = [], [], []
    for seed in seeds:
        config = load_config(folder / f"{name}.toml", [f"federation.seed={seed}"])
        rounds = list(draw_rounds(config, tuple(case.ranks)))
        answered = [client for round in rounds for client in round.answering]
        turns.append(len(answered))
        old.append(sum(2 * FP32 * values[client] for client in answered))
        new.append(play_rounds(case.modules, case.ranks, ((r.asked, r.answering) for r in rounds)))
    dense = Reference(fmean(run.bytes for run in new), new[0].rank)
    return Testbed(len(case.ranks), fmean(turns), fmean(old), dense)


def _values(case: Case, client: str) -> int:
    return sum(rank * sum(case.layout[module]) for module, rank in case.ranks[client].items())


def rebased(figures: Path, folder: Path, first_seed: int) -> list[tuple[float, Point]]:
    """(share by the old baseline, the point by today's) of every row that is scored by exact match.

    The others were made when the baseline was today's. Raises DataError for what is no front.csv.
    """
    found = [point for point in read_csv(figures) if point.metric == EXACT_MATCH]
    seeds = {point.testbed: point.seeds for point in found}
    beds = {name: play_testbed(folder, name, range(first_seed, first_seed + n)) for name, n in seeds.items()}
    return [_rebased(point, beds[point.testbed]) for point in found]


def _rebased(point: Point, bed: Testbed) -> tuple[float, Point]:
    sent = (point.up + point.down) * bed.turns
    return sent / bed.old, replace(point, share=sent / bed.new.bytes, client=sent / bed.clients, rank=bed.new.rank)


def changed(points: Sequence[tuple[float, Point]]) -> list[dict[str, str]]:
    """Before and after, side by side."""
    return [
        {
            "testbed": point.testbed,
            "budget": point.budget,
            "run": point.variant,
            "end %": f"{point.score:.1f} ± {point.half:.1f}",
            "before": f"{100 * old:.2f} %",
            f"{SHARE} FedIT of {point.rank}": f"{100 * point.share:.2f} %",
            "bytes of a client": f"{point.client:,.0f}",
        }
        for old, point in points
    ]
