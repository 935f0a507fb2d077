"""What a round costs late in a long run against early in it: all that keeps count of rounds must not grow with them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.made_up import median, play, settings

WINDOW = 20
"""Rounds of which the median is taken: the first ones after round 1, around round 10, and the last ones."""
CLIENTS = 4


def run(rounds: int, method: str) -> dict[str, Any]:
    """{"method", "rounds", "early", "late": {"round_s", "keeping_s"}, "ratio", "keeping_ratio", "report_s"}.

    round_s: processor's seconds of a round with `CLIENTS` made-up clients; keeping_s: of what is recorded, counted and
    saved at its end.
    """
    config = settings(CLIENTS, CLIENTS, rounds, [f"method.name={method}"])
    with tempfile.TemporaryDirectory() as folder:
        _, played, report = play(config, CLIENTS, Path(folder) / "run")
    early, late = (
        {"round_s": median(played.costs[part]), "keeping_s": median(played.keeping[part])}
        for part in (slice(2, 2 + WINDOW), slice(-WINDOW, None))
    )
    ratios = {name: late[key] / early[key] for name, key in (("ratio", "round_s"), ("keeping_ratio", "keeping_s"))}
    return {"method": method, "rounds": rounds, "early": early, "late": late, **ratios, "report_s": report}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The rows for a terminal."""
    table = Table(title=f"{result['method']}, {CLIENTS} clients: a round early in the run and around its end")
    for name in ("", "round 10, ms", f"round {result['rounds']}, ms", "ratio"):
        table.add_column(name, justify="right")
    for name, key, ratio in (("whole round", "round_s", "ratio"), ("recorded and saved", "keeping_s", "keeping_ratio")):
        early, late = (1000 * result[when][key] for when in ("early", "late"))
        table.add_row(name, f"{early:.1f}", f"{late:.1f}", f"{result[ratio]:.2f}")
    table.add_row("report at the end", "", f"{1000 * result['report_s']:.0f}", "")
    return [table]
