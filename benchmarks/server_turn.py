"""`python -m benchmarks round`: what a server's whole turn costs, where its time goes, and how it grows with clients.

Every client sends a payload of its own: the real `client_turn` makes it of a heavy-tailed change that no other client
has. The server turn that is measured is that of the fourth round: the guard has a step to judge, what a method carries
over is there, and a payload takes about as many bytes as the one before. In the first rounds it does not: B is zero.

Seconds are of the processor, with one thread: other work on the machine does not count, and seconds are work. Each is
the least of the repeats. The time inside a part does not count for the part that called it. The turn is played on all
processors too, by the clock on the wall: what is left idle there is the most that a pipeline over modules could win.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from benchmarks.wan import workload
from fedloom import wire
from fedloom.compress import sparsify
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError
from fedloom.lora import lowrank
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import State
from fedloom.methods.shared import averaging, guard
from fedloom.methods.table import build
from fedloom.rounds.job import Job
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import client_turn, server_turn, start
from fedloom.studies.estimate import machine
from fedloom.studies.estimate.presets import preset_named, preset_shapes
from fedloom.wire import streams

ROUND = 4
"""The round that is measured."""
PARTS: Mapping[str, Sequence[tuple[object, str]]] = {
    "kernel": (
        *((lowrank, f"ProductChange.{name}") for name in ("__init__", "add", "solve")),
        *((lowrank, f"ProductSum.{name}") for name in ("add", "truncate", "factors")),
        (lowrank, "truncate"),
        (guard, "inner_products"),
    ),
    "decode": ((wire, "decode"), (wire, "decode_lazily"), (sparsify, "floats")),
    "encode": ((wire, "encode"),),
    "choose": (
        (sparsify, "split"),
        (sparsify, "choose"),
        (sparsify, "importance"),
        (sparsify, "shortlist"),
        (sparsify, "select_largest"),
    ),
    "average": (
        (averaging, "weighted_mean"),
        *((guard, name) for name in ("Step.read", "Step.add", "Witness.watch", "Witness.judge")),
    ),
}
"""Part of a turn → the functions, by where they are found, whose time is that part's. What an older version of fedloom
lacks is left out, so that it can be measured beside this one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method's server turn with so many clients.

    cpu_s: the whole turn; kernel_cpu_s: low-rank algebra; decode_s and encode_s: the wire; choose_s: choosing elements
    of a broadcast; average_s: means and the guard; other_s: the rest. ratio: cpu_s over that of the fewest clients.
    floor_s: to decode every payload once and encode the broadcast once, nothing else; copy_s: to read the values that
    arrive and write those that leave as float32, at the rate of a copy. times_floor: cpu_s over floor_s. wall_s: the
    turn by the clock, on all processors; busy: how many of them worked in the mean.
    peak_adapters: the most memory that the turn took above what was there before it, payloads included in what was
    there, over the fp32 adapter; None where the system does not tell. payload_adapters: those payloads.
    """

    method: str
    clients: int
    cpu_s: float
    kernel_cpu_s: float
    decode_s: float
    encode_s: float
    choose_s: float
    average_s: float
    other_s: float
    floor_s: float
    copy_s: float
    times_floor: float
    wall_s: float
    busy: float
    ratio: float
    peak_adapters: float | None
    payload_adapters: float


def run(
    preset: str = "llama-3.2-3b",
    methods: Sequence[str] = ("fedsrd", "florist", "loom"),
    *,
    clients: Sequence[int] = (4, 16),
    rank: int | None = None,
    layers: int | None = 1,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """{"workload": …, "rows": [Row as a dict, …]}. layers: the first so many, None for all.

    Raises ConfigError for an unknown preset or method, and where there is nothing to measure.
    """
    if not methods or not clients or min(clients) < 1 or repeats < 1:
        raise ConfigError("nothing to measure: expected a method, one client or more, and one repeat or more")
    modules = preset_shapes(preset_named(preset), layers=layers)
    width = preset_named(preset).rank if rank is None else rank
    made = {name: build(name) for name in methods}
    jobs = {name: Job(method, seed, quantize(method.form())) for name, method in made.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        copied = machine.measure_rates().bytes
        rows = [row for job in jobs.values() for row in _of_method(job, modules, width, clients, repeats, copied)]
    finally:
        torch.set_num_threads(threads)
    parameters = width * sum(m + n for m, n in modules.values())
    named = {"name": f"{preset}, rank {width}, {len(modules)} modules", "parameters": parameters, "threads": 1}
    return {"workload": named, "rows": [asdict(row) for row in rows]}


def _of_method(
    job: Job, modules: Mapping[str, tuple[int, int]], rank: int, clients: Sequence[int], repeats: int, copied: float
) -> Iterator[Row]:
    """A row for every number of clients, the fewest first."""
    turns = [before_round(job, modules, rank, count) for count in sorted(set(clients))]
    rows = [measure(job, *turn, repeats, copied) for turn in turns]
    for row, peak in zip(rows, peaks(job, turns), strict=True):
        adapters = None if peak is None else peak / (4 * turns[0][0].adapter.numel())
        yield replace(row, ratio=row.cpu_s / rows[0].cpu_s, peak_adapters=adapters)


def peaks(job: Job, turns: Sequence[tuple[State, Mapping[str, bytes]]]) -> list[int | None]:
    """Bytes that each turn takes above what was there before it.

    In a process of its own, in which large blocks of memory go back to the system at once from the beginning: what
    malloc keeps of earlier work, in holes of its heap, would hide some of a turn's memory and add to the rest.
    """
    with tempfile.NamedTemporaryFile() as file:
        pickle.dump((job.method.name, job.seed, turns), file)
        file.flush()
        asked = [sys.executable, "-m", "benchmarks.server_turn", file.name]
        told = subprocess.run(
            asked,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            check=True,
        )
    found: list[int | None] = json.loads(told.stdout)
    return found


def tell_peaks(path: str) -> None:
    """The other process of `peaks`: print its answer."""
    name, seed, turns = pickle.loads(Path(path).read_bytes())
    method = build(name)
    job = Job(method, seed, quantize(method.form()))
    torch.set_num_threads(1)
    calls = [partial(server_turn, job, state, payloads, ROUND) for state, payloads in turns]
    calls[0]()
    print(json.dumps([machine.extra_bytes(call) for call in calls]))


def measure(job: Job, state: State, payloads: Mapping[str, bytes], repeats: int, copied: float) -> Row:
    """One row but for what needs others. copied: bytes a second of a copy."""
    call = partial(server_turn, job, state, payloads, ROUND)
    broadcast = wire.decode(call().payload)  # once before: what is loaded or compiled at the first call is there then
    spent = min((timed(call) for _ in range(repeats)), key=lambda one: one["whole"])
    wall, busy = on_all_processors(call, repeats)
    values, floor = 0, 0.0
    with machine.processor_time():
        for payload in payloads.values():
            floor += machine.best_seconds(partial(wire.decode, payload), repeats)
            values += _count(wire.decode(payload))
        floor += machine.best_seconds(partial(wire.encode, broadcast), repeats)
    return Row(
        method=job.method.name,
        clients=len(payloads),
        cpu_s=spent["whole"],
        kernel_cpu_s=spent["kernel"],
        **{f"{part}_s": spent[part] for part in PARTS if part != "kernel"},
        other_s=spent["whole"] - sum(spent[part] for part in PARTS),
        floor_s=floor,
        copy_s=2 * 4 * (values + _count(broadcast)) / copied,
        times_floor=spent["whole"] / floor,
        wall_s=wall,
        busy=busy,
        ratio=1.0,
        peak_adapters=None,
        payload_adapters=sum(map(len, payloads.values())) / (4 * state.adapter.numel()),
    )


def on_all_processors(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(seconds on the wall, processors at work in the mean) of the fastest call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    taken = []
    for _ in range(repeats):
        gc.collect()
        began, worked = time.perf_counter(), time.process_time()
        call()
        wall = time.perf_counter() - began
        taken.append((wall, (time.process_time() - worked) / wall))
    torch.set_num_threads(threads)
    return min(taken)


def _count(message: wire.Message) -> int:
    """Values that a message carries."""
    return sum(entry.values.numel() for entry in message.entries.values())


def before_round(
    job: Job, modules: Mapping[str, tuple[int, int]], rank: int, clients: int, last: int = ROUND
) -> tuple[State, dict[str, bytes]]:
    """The server's state before its turn in the round `last`, and what every client sends it then."""
    state = start(job, workload(modules, rank, job.seed).before)
    states = {f"site-{number:03d}": state for number in range(clients)}
    broadcasts: tuple[bytes, ...] = ()
    for round in range(1, last + 1):
        payloads = {}
        for number, client in enumerate(states):
            change = workload(modules, rank, 1000 * round + number + job.seed).change
            turn = client_turn(job, client, states[client], broadcasts, partial(_add, change), round)
            states[client] = turn.state if round < last else replace(turn.state, adapter=state.adapter)
            payloads[client] = turn.payload
        if round < last:
            done = server_turn(job, state, payloads, round)
            state, broadcasts = done.state, (done.payload,)
    return state, payloads


def _add(change: LoraState, state: State, round: int, seed: int) -> Trained:
    """Training that adds a change made beforehand, as much of it as the client's rank has."""
    after = {}
    for module, pair in state.adapter.items():
        moved = change[module]
        after[module] = LoraPair(pair.A + moved.A[: pair.rank], pair.B + moved.B[:, : pair.rank])
    return Trained(LoraState(after), num_examples=1, loss=0.0)


def timed(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of the processor: of the "whole" call, and of every part."""
    gc.collect()
    with clocks() as spent:
        began = time.process_time()
        call()
        spent["whole"] = time.process_time() - began
    return spent


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Within it the functions of PARTS count their threads' seconds, under whatever name a module knows them."""
    spent: dict[str, float] = defaultdict(float, dict.fromkeys(PARTS, 0.0))
    lock, stack = threading.Lock(), threading.local()
    undo: list[tuple[object, str, object]] = []
    for part, functions in PARTS.items():
        for module, path in functions:
            holder, _, name = path.rpartition(".")
            home = getattr(module, holder, None) if holder else module
            plain = getattr(home, name, None)
            if home is None or plain is None:
                continue
            clocked = _clocked(plain, part, spent, lock, stack)
            places = [home] if isinstance(home, type) else _modules_with(plain)
            undo += _put(clocked, plain, places)
    # What runs beside a part, on another thread, is that part's: so it runs within it, one after the other.
    undo += _put(_one_after_the_other, streams.run_side_by_side, _modules_with(streams.run_side_by_side))
    try:
        yield spent
    finally:
        for place, known, plain in undo:
            setattr(place, known, plain)


def _put(new: object, plain: object, places: Iterable[object]) -> list[tuple[object, str, object]]:
    """Have `new` stand for `plain` in these places; (place, name, `plain`) of each, for undoing it."""
    found = [(place, name, plain) for place in places for name, value in vars(place).items() if value is plain]
    for place, name, _ in found:
        setattr(place, name, new)
    return found


def _one_after_the_other(left: Callable[[], object], right: Callable[[], object], size: int) -> tuple[object, object]:
    return left(), right()


def _modules_with(function: object) -> list[object]:
    found = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "fedloom"]
    return [module for module in found if any(value is function for value in list(vars(module).values()))]


def _clocked(
    plain: Callable[..., object], part: str, spent: dict[str, float], lock: threading.Lock, stack: threading.local
) -> Callable[..., object]:
    """The function with a clock that stands still while another clock inside it runs."""

    @wraps(plain)
    def call(*given: object, **named: object) -> object:
        held = vars(stack).setdefault("inner", [0.0])
        held.append(0.0)
        began = time.thread_time()
        try:
            return plain(*given, **named)
        finally:
            whole, inner = time.thread_time() - began, held.pop()
            held[-1] += whole
            with lock:
                spent[part] += whole - inner

    return call


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The result for a terminal."""
    work = result["workload"]
    title = f"{work['name']}: {work['parameters']:,} parameters; seconds of the processor, one thread"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("method")
    seconds = ("cpu_s", "kernel_cpu_s", "decode_s", "encode_s", "choose_s", "average_s", "other_s", "floor_s")
    parts = [key.removesuffix("_s") for key in seconds]
    for column in ("clients", "× fewest", *parts, "× floor", "wall", "busy", "peak", "payloads"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        peak = "–" if row["peak_adapters"] is None else f"{row['peak_adapters']:.2f}"
        times = [f"{row[key]:.3f}" for key in seconds]
        wall = f"{row['wall_s']:.3f}", f"{row['busy']:.2f}"
        ratios = [f"{row['ratio']:.2f}", *times, f"{row['times_floor']:.1f}", *wall, peak]
        table.add_row(row["method"], str(row["clients"]), *ratios, f"{row['payload_adapters']:.2f}")
    yield table


if __name__ == "__main__":
    tell_peaks(sys.argv[1])
