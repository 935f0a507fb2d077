"""`python -m benchmarks goals [REF]`: what was asked of the whole round, with the code of a commit and today's.

Every row is one command of this package and one number made of its rows; docs/benchmarks/rounds.md has the table.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.table import Table

from benchmarks.against import Row, rows_of
from benchmarks.trees import Tree, measure, settle, tree_of, tree_of_today
from fedloom.errors import ConfigError

WHOLE = "round --preset llama-3.2-3b --layers all --methods fedsrd,fedsrd-e,loom --clients 4"
DELIVERY = "course --clients 10000 --attending 10 --rounds 20 --adapter demo"
LONG = "course --clients 4 --rounds 2000"
WORKERS = "workers --no-flower"
LAYER = "round --preset llama-3.2-3b --layers 1 --methods fedsrd,florist --clients 4,16"


@dataclass(frozen=True, slots=True)
class Goal:
    """A number of the whole round, and what was asked of it.

    name: short, for the command line. what: in words. command: after `python -m benchmarks`. number: of its rows.
    most, least: what was asked for; one of them. unit: of the number. then: whether the old code can play the command;
    else `today` says what it was by another count. rows: where the command's JSON has them.
    """

    name: str
    what: str
    command: str
    number: Callable[[Sequence[Row]], float]
    most: float | None = None
    least: float | None = None
    unit: str = ""
    then: bool = True
    today: str = "–"
    rows: str = "rows"

    def met(self, value: float) -> bool:
        """Whether the number is what was asked for."""
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)

    @property
    def asked(self) -> str:
        """What was asked for, in words."""
        return f"≤ {self.most:g}{self.unit}" if self.most is not None else f"≥ {self.least:g}{self.unit}"


def chosen(rows: Sequence[Row], **names: object) -> Row:
    """The one row that has these values. Raises ConfigError where there is not exactly one."""
    found = [row for row in rows if all(row.get(key) == value for key, value in names.items())]
    if len(found) != 1:
        raise ConfigError(f"expected one row with {names}, found {len(found)} of {len(rows)}")
    return found[0]


def beyond_kernel(rows: Sequence[Row]) -> float:
    """Seconds of FedSRD's server turn with four clients that are not the kernel's."""
    row = chosen(rows, method="fedsrd", clients=4)
    return float(row["cpu_s"] - row["kernel_cpu_s"])


def growth(rows: Sequence[Row]) -> float:
    """Sixteen clients over four, of whichever method grows most."""
    methods = {str(row["method"]) for row in rows}
    return max(
        float(chosen(rows, method=m, clients=16)["cpu_s"] / chosen(rows, method=m, clients=4)["cpu_s"]) for m in methods
    )


def largest(key: str, **among: Sequence[object]) -> Callable[[Sequence[Row]], float]:
    """The largest of a column, infinity where one has no number (a score that was never reached).

    among: column → values of the rows that count; all rows if left out.
    """
    return lambda rows: max(
        math.inf if row[key] is None else float(row[key])
        for row in rows
        if all(row[column] in values for column, values in among.items())
    )


GOALS = (
    Goal(
        "beyond-kernel",
        "Llama-3.2-3B, FedSRD of 4 clients: the server's turn beyond its kernel",
        WHOLE,
        beyond_kernel,
        most=1.0,
        unit=" s",
    ),
    Goal(
        "payloads",
        "the same turn of FedSRD-e and loom, over decoding the payloads and encoding the broadcast once",
        WHOLE,
        largest("times_floor", method=("fedsrd-e", "loom")),
        most=2.0,
        unit=" ×",
    ),
    Goal(
        "growth",
        "one layer of it, FedSRD and FLoRIST: 16 clients over 4",
        LAYER,
        growth,
        most=5.0,
        unit=" ×",
    ),
    Goal(
        "memory",
        "the same with 16 clients: peak memory, in adapters",
        LAYER,
        largest("peak_adapters", clients=(16,)),
        most=4.0,
    ),
    Goal(
        "delivery",
        "10,000 clients, the demo's adapter: the result to everybody, and the end of the run",
        DELIVERY,
        lambda rows: float(chosen(rows, part="end")["cpu_s"]),
        most=5.0,
        unit=" s",
    ),
    Goal(
        "late-rounds",
        "a run of 2,000 rounds, beside training: the last 50 over the first",
        LONG,
        lambda rows: float(chosen(rows, part="late round")["times"]),
        most=1.1,
        unit=" ×",
    ),
    Goal(
        "client",
        "the demo's client: a whole turn over a bare PEFT loop",
        "turn",
        largest("times_bare"),
        most=1.05,
        unit=" ×",
    ),
    Goal(
        "workers",
        "the demo on 2 cores: 4 worker processes over one process, in rounds a second",
        WORKERS,
        lambda rows: float(chosen(rows, way="4 workers")["gain"]),
        least=1.7,
        unit=" ×",
        then=False,
        today="one at a time",
    ),
    Goal(
        "buffered",
        "the demo's data shared by four sites, one of them 10 × slower: buffered over synchronous, simulated time to "
        "the same score and loss",
        "buffered",
        largest("ratio"),
        most=0.333,
        unit=" ×",
        then=False,
        today="synchronous alone",
        rows="reached",
    ),
)
"""In the order of the page; goals of the same command stand together, since it is played once for them."""
MINUTES = {
    WHOLE: 8, LAYER: 2, DELIVERY: 4, LONG: 6, "turn": 1, WORKERS: 3, "buffered": 5,
}  # fmt: skip
"""Command → minutes of one run, with the old code where it can."""


def run(
    ref: str, names: Sequence[str] = (), *, repeats: int = 3, told: Callable[[str], None] = print
) -> dict[str, Any]:
    """{"ref", "repeats", "rows": [{name, what, old, new, asked, met, command, remark}]}, a row for each goal.

    ref: the commit; with "" today's code is measured alone. names: of the goals; all if left out. told: is called with
    a line beforehand, which says how long it takes, and with one for every row as it is done. A number that could not
    be measured is None, and `remark` says why.
    Raises ConfigError for a goal or a commit that there is not.
    """
    goals = [goal for goal in GOALS if not names or goal.name in names]
    if unknown := set(names) - {goal.name for goal in goals}:
        raise ConfigError(f"no goal {min(unknown)!r}: expected {', '.join(goal.name for goal in GOALS)}")
    plays = {goal.command: repeats * (1 + (goal.then and bool(ref))) for goal in goals}
    minutes = 1 + sum(count * MINUTES[command] for command, count in plays.items())
    codes = "old and new code in turns" if ref else "today's code"
    told(f"{len(goals)} numbers, {repeats} repeats of {codes}: about {minutes:.0f} minutes")
    rows: list[dict[str, Any]] = []
    with tree_of(ref) if ref else nullcontext() as then:
        trees = [*([then] if then else []), tree_of_today()]
        for tree in trees:
            settle(tree)
        for command, group in groupby(goals, lambda goal: goal.command):
            found = measured(command, list(group), trees, repeats)
            rows += found
            told("; ".join(map(_line, found)))
    return {"ref": ref, "repeats": repeats, "rows": rows}


def measured(command: str, goals: Sequence[Goal], trees: Sequence[Tree], repeats: int) -> list[dict[str, Any]]:
    """The rows of the goals that a command has the numbers of: medians over the repeats, old and new code in turns."""
    taken: dict[str, list[Sequence[Row]]] = {tree.name: [] for tree in trees}
    faults: dict[str, str] = {}
    playing = [tree for tree in trees if goals[0].then or tree.name == "new"]
    for repeat in range(repeats):
        for tree in playing[:: -1 if repeat % 2 else 1]:
            if tree.name not in faults:
                try:
                    words = shlex.split(command)
                    taken[tree.name].append(rows_of(measure(tree, words), goals[0].rows, words))
                except ConfigError as error:  # the other numbers are measured nevertheless
                    faults[tree.name] = str(error).rpartition(" code: ")[2]
    return [_row(goal, taken, faults) for goal in goals]


def _row(goal: Goal, taken: Mapping[str, Sequence[Sequence[Row]]], faults: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, float | None] = {"old": None}
    remarks = dict(faults)
    for name, repeats in taken.items():
        try:
            found[name] = statistics.median(map(goal.number, repeats)) if repeats else None
        except (ConfigError, KeyError, ValueError, TypeError) as error:
            found[name], remarks[name] = None, f"{type(error).__name__}: {error}"
    told = {key: getattr(goal, key) for key in ("name", "what", "command", "unit", "today", "asked")}
    met = None if found["new"] is None else goal.met(found["new"])
    return {**told, **found, "met": met, "remark": "; ".join(f"{name} code: {why}" for name, why in remarks.items())}


def _line(row: Mapping[str, Any]) -> str:
    return f"{row['name']}: {_number(row['old'], row['unit'])} → {_number(row['new'], row['unit'])} {row['remark']}"


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The rows as the page has them."""
    codes = f"{result['ref']} and today, medians of {result['repeats']} in turns" if result["ref"] else "today"
    table = Table(title=f"the whole round, {codes}")
    for name in ("what", "before", "now", "asked for", "met", "command"):
        table.add_column(name, justify="right" if name in ("before", "now", "asked for") else "left")
    for row in result["rows"]:
        before = _number(row["old"], row["unit"]) if row["old"] is not None else row["today"]
        met = ", ".join(filter(None, [{True: "yes", False: "**no**", None: ""}[row["met"]], row["remark"]]))
        table.add_row(row["what"], before, _number(row["new"], row["unit"]), row["asked"], met, f"`{row['command']}`")
    return [table]


def _number(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.3g}{unit}"
