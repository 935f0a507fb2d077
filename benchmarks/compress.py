"""`python -m benchmarks compress`: what it costs a client to choose, round and encode its update.

`rounds.client_turn` is timed on an adapter of true shapes with a training step that only hands over a heavy-tailed
change made beforehand: everything that a turn does but receiving and training, whatever the method.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from benchmarks.wan import Workload, workload
from fedloom.compress.budget import Budget
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import State
from fedloom.methods.table import build
from fedloom.records.quantities import parse_budget
from fedloom.rounds.job import Job
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import ClientTurn, client_turn, start
from fedloom.studies.estimate import machine
from fedloom.studies.estimate.presets import preset_named, preset_shapes
from fedloom.wire import decode, encode

METHODS = ("loom", "fedsrd", "fedit")


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds on the wall, and of the processor: the sum over threads."""

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Row:
    """One method under its own coding of values.

    first_s: seconds of a client's first turn, which remembers nothing of an earlier one; send_s and cpu_s: seconds on
    the wall and of the processor of a later turn, the medians; encode_cpu_s: of the processor, to encode its payload
    once, which a method may do several times. times_floor: send_s over the least that reading takes.
    """

    method: str
    values: str
    up_bytes: int
    first_s: float
    send_s: float
    cpu_s: float
    encode_cpu_s: float
    times_floor: float


def run(
    preset: str = "llama-3.2-3b",
    methods: Sequence[str] = METHODS,
    *,
    budget: str = "",
    structured: bool = False,
    rank: int | None = None,
    layers: int | None = None,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """{"workload": …, "rows": [Row as a dict, …]}.

    budget: of the methods that have one, in place of their own. structured: changes whose rows and columns differ, see
    `bench.wire`. The floor is the time to read the adapter before and after training once, at the rate of a copy.
    Raises ConfigError for an unknown preset or method.
    """
    modules = preset_shapes(preset_named(preset), layers=layers)
    width = preset_named(preset).rank if rank is None else rank
    jobs = {name: _job(name, budget, seed) for name in methods}
    if not jobs or repeats < 1:
        raise ConfigError("nothing to measure: expected at least one method and one repeat")
    work = workload(modules, width, seed, structured)
    trained = [_trained(work, work.change), _trained(work, workload(modules, width, seed + 1, structured).change)]
    floor = 2 * 4 * work.before.numel() / machine.measure_rates().bytes
    return {
        "workload": {
            "name": f"{preset}, rank {width}, {'row and column structure' if structured else 'no structure'}",
            "parameters": work.before.numel(),
            "threads": torch.get_num_threads(),
            "floor_s": floor,
        },
        "rows": [asdict(_row(name, job, work.before, trained, repeats, floor)) for name, job in jobs.items()],
    }


def _job(name: str, budget: str, seed: int) -> Job:
    method = build(name)
    kept = Budget(*parse_budget(budget)) if budget and method.takes_budget else None
    return Job(method, seed, quantize(method.form(kept)), budget=kept)


def _trained(work: Workload, change: LoraState) -> Trained:
    """What training makes of the adapter."""
    after = {
        module: LoraPair(pair.A + change[module].A, pair.B + change[module].B) for module, pair in work.before.items()
    }
    return Trained(LoraState(after), num_examples=1, loss=0.0)


def _row(name: str, job: Job, before: LoraState, trained: Sequence[Trained], repeats: int, floor: float) -> Row:
    sending(job, "site", start(job, before), trained[0], 1)  # warms up
    turn, first = sending(job, "site", start(job, before), trained[0], 1)
    later = [sending(job, "site", turn.state, trained[1], 2) for _ in range(repeats)]
    wall, cpu = (statistics.median(column) for column in zip(*((s.wall, s.cpu) for _, s in later), strict=True))
    payload = later[0][0].payload
    message = decode(payload)
    with machine.processor_time():
        coding = machine.best_seconds(lambda: encode(message), repeats)
    return Row(name, job.method.values, len(payload), first.wall, wall, cpu, coding, wall / floor)


def sending(job: Job, client: str, state: State, trained: Trained, round: int) -> tuple[ClientTurn, Spent]:
    """A client's turn but for receiving and training, and what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    turn = client_turn(job, client, state, (), lambda state, round, seed: trained, round)
    return turn, Spent(time.perf_counter() - wall, time.process_time() - cpu)


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The result for a terminal."""
    work = result["workload"]
    title = (
        f"{work['name']}: {work['parameters']:,} parameters, {work['threads']} threads; "
        f"reading them before and after training takes {work['floor_s']:.3f} s"
    )
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("method", "values"):
        table.add_column(column)
    for column in ("up MiB", "first s", "later s", "CPU s", "encode CPU s", "× floor"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        times = [f"{row[key]:.3f}" for key in ("first_s", "send_s", "cpu_s", "encode_cpu_s")]
        size, ratio = f"{row['up_bytes'] / 2**20:.2f}", f"{row['times_floor']:.1f}"
        table.add_row(row["method"], row["values"], size, *times, ratio)
    yield table
