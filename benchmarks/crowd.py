"""A run of very many clients: peak memory and seconds as the rounds go by, and the bytes."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.made_up_runs import median, settings
from benchmarks.made_up_runs import play as play_made_up
from fedloom.records.config import Config
from fedloom.records.events import RunFacts, Silent
from fedloom.records.ledger import Training, read_rows, totals
from fedloom.server.local import run_local as play


class Meter(Silent):
    """Peak of the resident set, MiB, and seconds, after every tenth of the rounds and at the start."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.rows: list[dict[str, float]] = []

    def run_started(self, facts: RunFacts) -> None:
        """The model is loaded and the data are split."""
        self.note(0)

    def round_finished(self, round: int, num_rounds: int, *facts: object) -> None:
        """One row for each tenth of the run."""
        if round and round % max(num_rounds // 10, 1) == 0:
            self.note(round)

    def note(self, round: int) -> None:
        """Where the process stands now. Linux counts the peak in KiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.rows.append({"round": round, "peak_mib": peak, "seconds": time.perf_counter() - self.begun})


def run(config: Config) -> dict[str, Any]:
    """Play the whole run in a folder that is thrown away."""
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        play(config, Path(folder) / "run", observer=meter)
        rows = read_rows(Path(folder) / "run" / "ledger.jsonl")
    sums = totals(rows)
    return {
        "method": config.method.name,
        "clients": config.federation.num_clients,
        "turns": sum(isinstance(row, Training) for row in rows),
        "reached": len(sums.by_client),
        "transfers": sums.transfers,
        "bytes_up": sums.bytes_up,
        "bytes_down": sums.bytes_down,
        "rows": meter.rows,
    }


def run_made_up(clients: int, attending: int, rounds: int, own: Sequence[str]) -> dict[str, Any]:
    """A run of made-up clients whose training adds noise: what is left is what a crowd itself costs.

    start_s: processor's seconds up to the first round; early_s, late_s: of a round, the median of five; keeping_s: of
    what is recorded and saved at the end of a late one.
    """
    config = settings(clients, attending, rounds, own)
    with tempfile.TemporaryDirectory() as folder:
        start, played, report = play_made_up(config, clients, Path(folder) / "run")
        sums = totals(read_rows(Path(folder) / "run" / "ledger.jsonl"))
    every = max(rounds // 5, 1)
    return {
        "method": config.method.name,
        "clients": clients,
        "attending": attending,
        "start_s": start,
        "early_s": median(played.costs[2:7]),
        "late_s": median(played.costs[-5:]),
        "keeping_s": median(played.keeping[-6:-1] or played.keeping),
        "delivery_s": played.delivery,
        "report_s": report,
        "reached": len(sums.by_client),
        "transfers": sums.transfers,
        "bytes_up": sums.bytes_up,
        "bytes_down": sums.bytes_down,
        "peaks": {round: played.peaks[round] for round in range(0, rounds + 1, every)},
    }


def made_up_tables(result: Mapping[str, Any]) -> list[Table]:
    """The result for a terminal."""
    title = f"{result['method']}, {result['clients']:,} made-up clients, {result['attending']} a round"
    table = Table("", "", title=title, show_header=False)
    for name, key in (
        ("start-up, s", "start_s"),
        ("an early round, s", "early_s"),
        ("a late round, s", "late_s"),
        ("of which recorded and saved", "keeping_s"),
        ("delivery, s", "delivery_s"),
        ("report, s", "report_s"),
    ):
        table.add_row(name, f"{result[key]:.3f}")
    for round, peak in result["peaks"].items():
        table.add_row(f"peak after round {round}, MiB", f"{peak:.0f}")
    table.add_row("transfers", f"{result['transfers']:,}")
    table.add_row("bytes up, down", f"{result['bytes_up']:,}, {result['bytes_down']:,}")
    table.add_row("clients reached", f"{result['reached']:,}")
    return [table]


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The rows for a terminal."""
    table = Table(
        title=f"{result['method']}, {result['clients']} clients: {result['turns']} turns, {result['bytes_up']:,} bytes "
        f"up, {result['bytes_down']:,} down in {result['transfers']} transfers, {result['reached']} clients reached"
    )
    for name in ("round", "peak MiB", "seconds"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(f"{row['round']:.0f}", f"{row['peak_mib']:.1f}", f"{row['seconds']:.1f}")
    return [table]
