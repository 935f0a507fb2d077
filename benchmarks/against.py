"""`python -m benchmarks against REF COMMAND …`: the same measurement with the code of a commit and with today's.

Both versions take turns, each in a process of its own and in the same environment; the median of the repeats counts.
The rows of the two are paired by what names them: words, and whole numbers that are the same on both sides.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.trees import Measured, Tree, measure, settle, tree_of, tree_of_today
from fedloom.errors import ConfigError

PROCESS = {"process_cpu_s": "cpu_s", "process_peak_mib": "peak_mib"}
"""Number of the whole process → what `Measured` calls it."""
Row = Mapping[str, Any]


def run(ref: str, words: Sequence[str], *, repeats: int = 3, own: bool = False, rows: str = "rows") -> dict[str, Any]:
    """{"ref", "command", "repeats", "rows": [{the row's names …, "number", "old", "new", "ratio"}]}.

    words: a command of `python -m benchmarks` that takes --json and prints a list of rows under the key `rows`. own:
    the old code is measured by the measurements of its day. ratio: new over old; None where one has no such number.
    Raises ConfigError for a commit that git does not know, and where a measurement fails with either code.
    """
    if not words:
        raise ConfigError("nothing to measure: give a command, such as aggregate --methods fedsrd")
    with tree_of(ref, own=own) as then:
        taken = in_turns([then, tree_of_today()], words, repeats)
    old, new = ([rows_of(one, rows, words) for one in taken[name]] for name in ("old", "new"))
    whole = [
        {
            "number": number,
            **_ratio(*(statistics.median(getattr(one, key) for one in taken[n]) for n in ("old", "new"))),
        }
        for number, key in PROCESS.items()
    ]
    return {"ref": ref, "command": " ".join(words), "repeats": repeats, "rows": [*compare(old, new), *whole]}


def in_turns(trees: Sequence[Tree], words: Sequence[str], repeats: int) -> dict[str, list[Measured]]:
    """Tree → its measurements. Who goes first changes from repeat to repeat."""
    for tree in trees:
        settle(tree)
    taken: dict[str, list[Measured]] = {tree.name: [] for tree in trees}
    for repeat in range(repeats):
        for tree in trees[:: -1 if repeat % 2 else 1]:
            taken[tree.name].append(measure(tree, words))
    return taken


def compare(old: Sequence[Sequence[Row]], new: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """A row for each number of each row that both have. old, new: the rows of every repeat."""
    names = naming_columns([*old, *new])
    held = [_by_name(repeats, names) for repeats in (old, new)]
    found = []
    for name in held[0]:
        if name in held[1]:
            told = dict(zip(names, name[:-1], strict=True))
            columns = [column for column in held[1][name] if column in held[0][name]]
            found += [{**told, "number": c, **_ratio(*(side[name][c] for side in held))} for c in columns]
    return found


def naming_columns(taken: Sequence[Sequence[Row]]) -> list[str]:
    """The columns that say which row it is: words, and whole numbers that are the same in all measurements.

    taken: the rows of every measurement. A number that differs anywhere was measured.
    """

    def names(column: str) -> bool:
        values = [[row.get(column) for row in rows] for rows in taken]
        if all(isinstance(value, str | bool) for some in values for value in some):
            return True
        whole = all(isinstance(value, int) for some in values for value in some)
        return whole and all(Counter(some) == Counter(values[0]) for some in values)

    return [column for column in taken[0][0] if names(column)]


def _by_name(repeats: Sequence[Sequence[Row]], names: Sequence[str]) -> dict[tuple[Any, ...], dict[str, float]]:
    """What names a row, and which of those so named it is → number → its median over the repeats."""
    found: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for rows in repeats:
        seen: Counter[tuple[Any, ...]] = Counter()
        for row in rows:
            name = tuple(row[column] for column in names)
            numbers = found.setdefault((*name, seen[name]), {})
            seen[name] += 1
            for column, value in row.items():
                if column not in names and isinstance(value, int | float) and not isinstance(value, bool):
                    numbers.setdefault(column, []).append(value)
    return {name: {c: statistics.median(taken) for c, taken in numbers.items()} for name, numbers in found.items()}


def rows_of(measured: Measured, key: str, words: Sequence[str]) -> Sequence[Row]:
    """The rows that a command printed under a key, as a list or by name. Raises ConfigError where there are none."""
    rows = measured.result.get(key)
    if isinstance(rows, dict):
        rows = [{"name": name, **row} for name, row in rows.items() if isinstance(row, dict)]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        kept = [name for name, value in measured.result.items() if isinstance(value, list | dict)]
        raise ConfigError(f"`{' '.join(words)}` prints no rows called {key!r}; it has {', '.join(kept) or 'none'}")
    return [_flat(row) for row in rows]


def _flat(row: Row) -> dict[str, Any]:
    """What a row holds by name as columns of its own: {"stages": {"read": 1}} → {"stages.read": 1}."""
    found: dict[str, Any] = {}
    for column, value in row.items():
        found |= {f"{column}.{k}": v for k, v in _flat(value).items()} if isinstance(value, dict) else {column: value}
    return found


def _ratio(old: float, new: float) -> dict[str, float | None]:
    return {"old": old, "new": new, "ratio": new / old if old else None}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The rows for a terminal."""
    table = Table(title=f"{result['command']}: {result['ref']} and today, medians of {result['repeats']} in turns")
    names = [column for column in result["rows"][0] if column not in ("old", "new", "ratio")]
    for name in names:
        table.add_column(name)
    for name in ("old", "new", "new / old"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        told = [str(row.get(name, "whole process" if number == 0 else "")) for number, name in enumerate(names)]
        table.add_row(*told, *(_number(row[key]) for key in ("old", "new", "ratio")))
    return [table]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
