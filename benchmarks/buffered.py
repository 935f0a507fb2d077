"""One site much slower than the others: simulated time until asynchronous rounds have the score of synchronous ones.

Time is counted in turns of the other sites. A synchronous round lasts as long as the turn of its slowest site; an
asynchronous run keeps its own clock (`simulated_time` of its steps). The target is what the synchronous run scores at
its end, the mean over domains, and a run's time is that of its first evaluation at least as good.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from fedloom.records.config import Config
from fedloom.records.ledger import Aggregation, Evaluation, Row, Training, read_rows
from fedloom.server.local import run_local

MEASURES: Mapping[str, Callable[[Evaluation], float]] = {
    "exact match": lambda row: row.exact_match,
    "loss": lambda row: -row.loss,
}
"""Score → what is better the larger it is."""


def run(synchronous: Config, buffered: Config, slowest: float) -> dict[str, Any]:
    """Play both runs in a folder that is thrown away. slowest: how long the turn of the slowest site takes."""
    with tempfile.TemporaryDirectory() as folder:
        courses = {}
        for name, config in (("synchronous", synchronous), ("buffered", buffered)):
            run_local(config, Path(folder) / name).check()
            rows = read_rows(Path(folder) / name / "ledger.jsonl")
            clock = read_clock(rows, slowest)
            courses[name] = {
                "steps": len(clock) - 1,
                "turns": sum(isinstance(row, Training) for row in rows),
                "time": max(clock.values()),
                "scores": {measure: read_scores(rows, clock, measure) for measure in MEASURES},
            }
    return {"slowest": slowest, "runs": courses, "reached": {name: compare_times(courses, name) for name in MEASURES}}


def read_clock(rows: list[Row], slowest: float) -> dict[int, float]:
    """Round → simulated time at its end."""
    clock = {0: 0.0}
    for row in rows:
        if isinstance(row, Aggregation):
            clock[row.round] = row.stats.get("simulated_time", row.round * slowest)
    return clock


def read_scores(rows: list[Row], clock: Mapping[int, float], measure: str) -> list[tuple[float, float]]:
    """(time, mean over domains) of every evaluation."""
    scores: dict[int, list[float]] = {}
    for row in rows:
        if isinstance(row, Evaluation):
            scores.setdefault(row.round, []).append(MEASURES[measure](row))
    return [(clock[round], fmean(held)) for round, held in scores.items()]


def compare_times(courses: Mapping[str, Any], measure: str) -> dict[str, float | None]:
    """The synchronous run's last score, when either run had it, and the ratio of these times; None where never."""
    scores = {name: course["scores"][measure] for name, course in courses.items()}
    target = scores["synchronous"][-1][1]
    when = {name: next((time for time, score in held if score >= target), None) for name, held in scores.items()}
    early, late = when["buffered"], when["synchronous"]
    return {"target": abs(target), **when, "ratio": early / late if early and late else None}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The runs, and the times until they had the score."""
    runs = Table(title=f"One site {result['slowest']:g} × slower", title_justify="left")
    for heading in ("rounds", "steps", "turns", "simulated time", "exact match", "loss"):
        runs.add_column(heading, justify="left" if heading == "rounds" else "right")
    for name, course in result["runs"].items():
        last = [abs(course["scores"][measure][-1][1]) for measure in MEASURES]
        runs.add_row(
            name, str(course["steps"]), str(course["turns"]), f"{course['time']:g}", *(f"{score:.3f}" for score in last)
        )
    reached = Table(title="Simulated time until the score of the synchronous run's end", title_justify="left")
    for heading in ("score", "target", "synchronous", "buffered", "ratio"):
        reached.add_column(heading, justify="left" if heading == "score" else "right")
    for measure, found in result["reached"].items():
        times = ("never" if found[key] is None else f"{found[key]:.3g}" for key in ("synchronous", "buffered", "ratio"))
        reached.add_row(measure, f"{found['target']:.3f}", *times)
    return [runs, reached]
