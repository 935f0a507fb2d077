"""`python -m benchmarks aggregate`: server kernels on adapters of true shapes, against the dense ones they replace."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Table

from benchmarks import accuracy
from benchmarks.kernels import KERNELS, Kernel, two_svds
from benchmarks.workload import Module, module
from fedloom.errors import ConfigError, NumericError
from fedloom.lora.lowrank import ProductSum, sparse
from fedloom.lora.lowrank.parallel import map_modules
from fedloom.lora.pair import LoraPair
from fedloom.studies.estimate import machine
from fedloom.studies.estimate.presets import preset_named, preset_shapes

REFERENCE_SECONDS = 10.0
"""No repeat of a dense reference begins later."""
DEFAULT_METHODS = ("fedit", "fedsrd", "fedsrd-e", "florist", "flexlora")


@dataclass(frozen=True, slots=True)
class Row:
    """One method's result. Seconds are those of all modules; extra_bytes those of the largest module.

    reference_seconds: the dense computation, timed on one module of each shape and multiplied by how many there are.
    ratio: reference over kernel. share: the floor (see `kernels.Work`) over the seconds taken. error and excess: the
    worst over the shapes, see `accuracy.Deviation`.
    """

    method: str
    modules: int
    seconds: float
    reference_seconds: float | None
    ratio: float | None
    extra_bytes: int | None
    excess: float | None
    error: float | None
    share: float


def run(
    *,
    preset: str = "llama-3.2-3b",
    clients: int = 4,
    rank: int | None = None,
    ranks: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    modules: Sequence[str] | None = None,
    all_modules: bool = False,
    reference: bool = False,
    repeats: int = 3,
    seed: int = 0,
    device: str = "cpu",
    torch_only: bool = False,
    cpu_time: bool = False,
    keep_results: bool = False,
) -> dict[str, object]:
    """Time the kernels of `methods` on one layer of a preset, or on all with `all_modules`; see the command's help.

    clients adapters of rank `rank` (the preset's by default), or one for each of `ranks`. Repeats are interleaved
    between methods and the median is kept. Returns {"rows", "accuracy", "streaming", "machine"}, plain JSON values.
    device: where the adapters lie and the kernels run, "cpu" or "cuda". torch_only: as if numba were not installed.
    cpu_time: seconds of processor time in place of wall-clock time, rates included. keep_results: hold those of all
    modules until the last is done; without it each is freed at once, as a dense reference's is.
    Raises ConfigError for an unknown preset, method or module, for methods that need equal ranks, and for a device
    that this machine has not got.
    """
    machine.check_device(device)
    chosen = preset_named(preset)
    sizes = list(ranks) if ranks else [chosen.rank if rank is None else rank] * clients
    if not sizes or min(sizes) < 1 or repeats < 1:
        raise ConfigError(
            f"ranks {sizes}, repeats {repeats}: expected at least one client, ranks and repeats of 1 or more"
        )
    kernels = _kernels(DEFAULT_METHODS if methods is None else methods, sizes)
    layout = preset_shapes(chosen, modules, None if all_modules else 1)
    streamed = streaming() if reference else []  # first: later, what malloc scattered would count
    work = [module(name, shape, sizes, seed, device) for name, shape in layout.items()]
    sample = {case.pair.shape: case for case in work}
    clock = machine.processor_time() if cpu_time else nullcontext()
    with clock, sparse.torch_only() if torch_only else nullcontext():
        return {**_measured(kernels, work, sample, reference, repeats, device, keep_results), "streaming": streamed}


def _measured(
    kernels: Mapping[str, Kernel],
    work: Sequence[Module],
    sample: Mapping[tuple[int, int], Module],
    reference: bool,
    repeats: int,
    device: str,
    keep_results: bool,
) -> dict[str, object]:
    calls = {method: kernel.run if keep_results else partial(_run, kernel) for method, kernel in kernels.items()}
    for kernel in kernels.values():
        for case in sample.values():
            kernel.run(case)
    times: dict[str, list[float]] = {method: [] for method in kernels}
    trials = []
    for _ in range(repeats):
        trials.append(machine.measure_rates(device))
        for method, call in calls.items():
            times[method].append(machine.time_call(partial(map_modules, call, work, [math.inf])))
    measured = machine.median_rates(trials)
    counts = {shape: sum(case.pair.shape == shape for case in work) for shape in sample}
    dense = _dense_seconds(kernels, sample, counts, repeats) if reference else {}
    rows = [_row(m, k, work, sample, statistics.median(times[m]), dense.get(m), measured) for m, k in kernels.items()]
    if reference and "florist" in kernels:
        rows.append(_published(rows, _of_each(two_svds, sample, counts, repeats)))
    return {
        "rows": [vars_of(row) for row in rows],
        "accuracy": accuracy.hard_cases(*_hard_size(sample)) if reference else [],
        "machine": machine.describe_machine(measured, device),
    }


def _run(kernel: Kernel, case: Module) -> None:
    """Without the result, whose memory the next module can then use."""
    kernel.run(case)


def _hard_size(sample: Mapping[tuple[int, int], Module]) -> tuple[int, int]:
    """Rank and number of clients of the hard cases: those of the bench, but no more than four clients."""
    case = next(iter(sample.values()))
    return case.pair.rank, min(len(case.clients), 4)


def vars_of(row: Row) -> dict[str, object]:
    """The row as a dictionary, with the keys of the JSON output."""
    return {key: getattr(row, key) for key in Row.__slots__}


def _kernels(methods: Sequence[str], sizes: Sequence[int]) -> dict[str, Kernel]:
    for method in methods:
        if method not in KERNELS:
            raise ConfigError(f"method {method!r} has no kernel to bench; known: {', '.join(KERNELS)}")
    equal = len(set(sizes)) == 1
    usable = {method: KERNELS[method] for method in methods if equal or not KERNELS[method].equal_ranks}
    if not usable:
        raise ConfigError(
            f"{', '.join(methods)} cannot combine ranks {list(sizes)}: give equal ranks, or another method"
        )
    return usable


def _dense_seconds(
    kernels: Mapping[str, Kernel],
    sample: Mapping[tuple[int, int], Module],
    counts: Mapping[tuple[int, int], int],
    repeats: int,
) -> dict[str, float]:
    """Of every dense computation once, also where two methods have the same."""
    known: dict[Callable[[Module], object], float] = {}
    for kernel in kernels.values():
        if kernel.dense is not None and kernel.dense not in known:
            known[kernel.dense] = _of_each(kernel.dense, sample, counts, repeats)
    return {method: known[kernel.dense] for method, kernel in kernels.items() if kernel.dense is not None}


def _of_each(
    call: Callable[[Module], object],
    sample: Mapping[tuple[int, int], Module],
    counts: Mapping[tuple[int, int], int],
    repeats: int,
) -> float:
    """Seconds of a reference for all modules: the median of as many repeats as begin within REFERENCE_SECONDS."""
    found: list[float] = []
    started = time.monotonic()
    try:
        while len(found) < repeats and (not found or time.monotonic() - started < REFERENCE_SECONDS):
            found.append(sum(counts[shape] * machine.time_call(partial(call, case)) for shape, case in sample.items()))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericError(
            f"the dense reference does not converge here ({str(error).splitlines()[0]}): leave --reference "
            "out, or try other --modules, another --seed or another number of threads"
        ) from None
    return statistics.median(found)


def _row(
    method: str,
    kernel: Kernel,
    work: Sequence[Module],
    sample: Mapping[tuple[int, int], Module],
    taken: float,
    dense: float | None,
    measured: machine.Rates,
) -> Row:
    largest = max(sample.values(), key=lambda case: case.pair.shape[0] * case.pair.shape[1])
    found = [kernel.check(case) for case in sample.values()] if kernel.check else []
    excesses = [deviation.excess for deviation in found if deviation.excess is not None]
    floor = sum(kernel.work(case).seconds(measured) for case in work)
    return Row(
        method=method,
        modules=len(work),
        seconds=taken,
        reference_seconds=dense,
        ratio=dense / taken if dense is not None else None,
        extra_bytes=machine.extra_bytes(lambda: kernel.run(largest), largest.pair.A.device.type),
        excess=max(excesses) if excesses else None,
        error=max(deviation.error for deviation in found) if found else None,
        share=floor / taken,
    )


def _published(rows: Sequence[Row], taken: float) -> Row:
    """FLoRIST with the two SVDs of the paper, timed on one module of each shape: a reference, not a kernel."""
    ours = next(row for row in rows if row.method == "florist")
    ratio = ours.reference_seconds / taken if ours.reference_seconds is not None else None
    share = ours.share * ours.seconds / taken
    return Row("florist as published", ours.modules, taken, ours.reference_seconds, ratio, None, None, None, share)


def streaming(
    rank: int = 8, shape: tuple[int, int] = (3072, 8192), counts: Sequence[int] = (10, 1000)
) -> list[dict[str, object]]:
    """Peak memory of a capped sum of few and of many clients, whose adapters are made as they are added.

    extra_bytes: of the resident set, libraries' workspace included; tensor_bytes: of live tensors.
    """

    def add_all(count: int) -> float:
        total = ProductSum(shape, cap=4 * rank)
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            a = torch.randn(rank, shape[1], generator=generator)
            total.add(LoraPair(a, torch.randn(shape[0], rank, generator=generator)), 1.0 / count)
        return total.truncate(rank=rank).lost_energy

    add_all(50)
    return [
        {"clients": count, "extra_bytes": machine.extra_bytes(call), "tensor_bytes": machine.tensor_bytes(call)}
        for count in counts
        for call in [partial(add_all, count)]
    ]


def tables(result: Mapping[str, object]) -> list[Table]:
    """What `run` returned, as tables to print."""
    return [_table(title, rows) for title in TITLES if isinstance(rows := result[title], list) and rows]


TITLES: Mapping[str, str] = {
    "rows": "Server kernels; ratio: dense reference over kernel; share: floor of counted work over time taken",
    "accuracy": "Hard cases; error: of the change, or of singular values; excess: over the best of that rank",
    "streaming": "Peak memory of a capped sum over many clients",
}
FORMATS: Mapping[str, str] = {
    "seconds": ".3f",
    "reference_seconds": ".1f",
    "ratio": ".0f",
    "excess": ".1e",
    "error": ".1e",
    "share": ".0%",
    "extra_bytes": ",d",
    "tensor_bytes": ",d",
}


def _table(key: str, rows: Sequence[Mapping[str, object]]) -> Table:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(title=TITLES[key])
    for column in columns:
        table.add_column(column, justify="left" if column in ("method", "case") else "right")
    for row in rows:
        cells = [row.get(column) for column in columns]
        table.add_row(*(_cell(cell, FORMATS.get(c, "")) for c, cell in zip(columns, cells, strict=True)))
    return table


def _cell(value: object, spec: str) -> str:
    return "–" if value is None else format(value, spec)
