"""The local engine with worker processes against the same run one client after another, and against flower-sim.

All runs have the same settings, take turns, and are compared bit by bit. What is timed are the rounds, evaluation
included: from the end of round 1, when all processes are there and have loaded everything, to the end of the last.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table

from fedloom.records.config import Config
from fedloom.records.events import Silent
from fedloom.server.local import run_local

SECONDS = ("seconds", "stages", "time", "settings")
"""Fields of ledger rows in which two runs of the same bits may differ."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A time of the wall clock, and the seconds of CPU that this process and those below it had taken."""

    wall: float
    own: float
    others: float

    @classmethod
    def now(cls) -> Moment:
        """As it is."""
        others = 0.0
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                others += times.user + times.system
        return cls(time.perf_counter(), time.process_time(), others)


class Clock(Silent):
    """When each round ended; the first is round 0."""

    def __init__(self) -> None:
        self.ends: list[Moment] = []

    def round_finished(
        self, round: int, num_rounds: int, scores: object, bytes_up: int, bytes_down: int, seconds: float
    ) -> None:
        """Take the time."""
        self.ends.append(Moment.now())


def run(config: Config, workers: int, *, repeats: int = 1, flower: bool = True) -> dict[str, Any]:
    """Rows of one process, `workers` and (with `flower`) flower-sim on as many CPUs: medians over the repeats.

    rounds_s: the wall time of the rounds. whole_s: of the run, from settings to report. own_s, others_s: seconds of CPU
    in the rounds, of the run's process and of all others. bound_s: what the rounds take at least on CPUs that nobody
    else uses: own_s and, shared out, others_s. gain, gain_bound: rounds_s and bound_s of one process over the row's.
    same_adapter, same_ledger: whether the row has the first row's bits, seconds left out; flower-sim has its own rows.
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
    rows: list[dict[str, Any]] = []
    for name, found in taken.items():
        row = {key: statistics.median(one[key] for one in found) for key in found[0]}
        ledger = None if name == "flower-sim" else left[name][1] == first[1]
        rows.append({"way": name, **row, "same_adapter": left[name][0] == first[0], "same_ledger": ledger})
    cpus = os.cpu_count() or 1
    for row in rows:
        row["bound_s"] = row["own_s"] + row["others_s"] / min(workers, cpus)
        row |= {"gain": rows[0]["rounds_s"] / row["rounds_s"], "gain_bound": rows[0]["bound_s"] / row["bound_s"]}
    threads = config.model.threads or torch.get_num_threads()
    rounds = config.federation.num_rounds
    return {"rows": rows, "rounds": rounds, "cpus": cpus, "threads": threads, "repeats": repeats}


def _with(config: Config, workers: int | None) -> Config:
    return config.model_copy(update={"local": config.local.model_copy(update={"workers": workers, "devices": ()})})


def _simulate(config: Config, processes: int, out: Path, clock: Clock) -> None:
    from fedloom.flower.simulated.simulation import run_simulated

    rules = config.flower.model_copy(update={"sim_cpus": processes})
    run_simulated(config.model_copy(update={"flower": rules}), out, observer=clock)


def _time(play: Callable[[Path, Clock], object], out: Path) -> dict[str, float]:
    """One run's seconds."""
    clock, begun = Clock(), time.perf_counter()
    play(out, clock)
    whole, first, last = time.perf_counter() - begun, clock.ends[1], clock.ends[-1]
    own, others = last.own - first.own, last.others - first.others
    return {"rounds_s": last.wall - first.wall, "whole_s": whole, "own_s": own, "others_s": others}


def read_result(out: Path) -> tuple[bytes, str]:
    """(the adapter's bytes, the ledger without seconds)."""
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{key: value for key, value in row.items() if key not in SECONDS} for row in rows]
    return (out / "adapter" / "adapter_model.safetensors").read_bytes(), json.dumps(kept)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The rows for a terminal."""
    title = f"rounds 2 to {result['rounds']} on {result['cpus']} CPUs, {result['threads']} threads a process"
    table = Table(title=f"{title}, median of {result['repeats']}; seconds of the rounds")
    heads = ("way", "wall", "gain", "CPU: own", "others", "wall at least", "gain at most", "whole run", "same bits")
    for name in heads:
        table.add_column(name, justify="left" if name == "way" else "right")
    words = {True: "yes", False: "no", None: "–"}
    for row in result["rows"]:
        cells = [f"{row['rounds_s']:.1f}", f"{row['gain']:.2f}", f"{row['own_s']:.1f}", f"{row['others_s']:.1f}"]
        cells += [f"{row['bound_s']:.1f}", f"{row['gain_bound']:.2f}", f"{row['whole_s']:.1f}"]
        same = f"adapter {words[row['same_adapter']]}, ledger {words[row['same_ledger']]}"
        table.add_row(row["way"], *cells, same)
    return [table]
