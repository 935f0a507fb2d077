"""The local engine with worker processes against the same run one client after another, and against flower-sim.

All runs have the same settings, take turns, and are compared bit by bit. What is timed are the rounds, evaluation
included: from the end of round 0, when everything is loaded and was used once, to the end of the last.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fedloom.records.config import Config
from fedloom.records.events import Silent
from fedloom.server.local import run_local

SECONDS = ("seconds", "time", "settings")
"""Fields of ledger rows in which two runs of the same bits may differ."""


class Clock(Silent):
    """When the first evaluation and the last round ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def round_finished(
        self, round: int, num_rounds: int, scores: object, bytes_up: int, bytes_down: int, seconds: float
    ) -> None:
        """Take the time."""
        self.ends.append(time.perf_counter())


def run(config: Config, workers: int, *, repeats: int = 1, flower: bool = True) -> dict[str, Any]:
    """Rows of one process, `workers` and (with `flower`) flower-sim on as many CPUs: medians over the repeats.

    rounds_s: the wall time of the rounds. whole_s: of the run, from settings to report. cpu_s: seconds of CPU of all
    processes. gain: rounds_s of one process over that of the row. same: whether the row's adapter has the first row's
    bits, and so its ledger, seconds left out.
    """
    ways: dict[str, Callable[[Path, Clock], object]] = {
        "1 process": lambda out, clock: run_local(_with(config, None), out, observer=clock),
        f"{workers} workers": lambda out, clock: run_local(_with(config, workers), out, observer=clock),
    }
    if flower:
        ways["flower-sim"] = lambda out, clock: _simulate(config, workers, out, clock)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    left: dict[str, tuple[bytes, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for number, (name, play) in enumerate(ways.items()):
                out = Path(folder) / f"{repeat}-{number}"
                taken[name].append(_time(play, out))
                left[name] = read_result(out)
    first, *_ = left.values()
    rows = []
    for name, found in taken.items():
        row = {key: statistics.median(one[key] for one in found) for key in found[0]}
        ledger = None if name == "flower-sim" else left[name][1] == first[1]
        rows.append({"way": name, **row, "same_adapter": left[name][0] == first[0], "same_ledger": ledger})
    for row in rows:
        row["gain"] = rows[0]["rounds_s"] / row["rounds_s"]
    threads = config.model.threads or torch.get_num_threads()
    rounds = config.federation.num_rounds
    return {"rows": rows, "rounds": rounds, "cpus": os.cpu_count(), "threads": threads, "repeats": repeats}


def _with(config: Config, workers: int | None) -> Config:
    return config.model_copy(update={"local": config.local.model_copy(update={"workers": workers, "devices": ()})})


def _simulate(config: Config, processes: int, out: Path, clock: Clock) -> None:
    from fedloom.flower.simulated.simulation import run_simulated

    rules = config.flower.model_copy(update={"sim_cpus": processes})
    run_simulated(config.model_copy(update={"flower": rules}), out, observer=clock)


def _time(play: Callable[[Path, Clock], object], out: Path) -> dict[str, float]:
    """One run's seconds."""
    clock, before, begun = Clock(), os.times(), time.perf_counter()
    play(out, clock)
    whole, after = time.perf_counter() - begun, os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    return {"rounds_s": clock.ends[-1] - clock.ends[0], "whole_s": whole, "cpu_s": cpu}


def read_result(out: Path) -> tuple[bytes, str]:
    """(the adapter's bytes, the ledger without seconds)."""
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{key: value for key, value in row.items() if key not in SECONDS} for row in rows]
    return (out / "adapter" / "adapter_model.safetensors").read_bytes(), json.dumps(kept)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The rows for a terminal."""
    title = f"{result['rounds']} rounds on {result['cpus']} CPUs, {result['threads']} threads a process"
    table = Table(title=f"{title}, median of {result['repeats']}")
    for name in ("way", "rounds, s", "whole run, s", "CPU, s", "rounds: 1 process over it", "same adapter", "ledger"):
        table.add_column(name, justify="left" if name == "way" else "right")
    words = {True: "yes", False: "no", None: "its own"}
    for row in result["rows"]:
        numbers = [f"{row[key]:.1f}" for key in ("rounds_s", "whole_s", "cpu_s")]
        told = (words[row["same_adapter"]], words[row["same_ledger"]])
        table.add_row(row["way"], *numbers, f"{row['gain']:.2f}", *told)
    return [table]
