"""`python -m benchmarks device`: what leaves a GPU after training, and where it is chosen from, stage by stage.

A run copies the trained adapter out once, factor by factor, and chooses, rounds and encodes in memory. Beside that two
things are timed that are not done: one copy of all factors together, and choosing on the device. Server kernels on a
device are `python -m benchmarks aggregate --device cuda`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.wire import DENSITY, heavy_tailed
from fedloom.compress.seeds import derived_seed
from fedloom.compress.sparsify import kept_count, top_positions
from fedloom.lora.pair import initial_state
from fedloom.studies.estimate import machine
from fedloom.studies.estimate.presets import preset_named, preset_shapes


def run(
    preset: str = "llama-3.2-3b",
    *,
    device: str = "cuda",
    rank: int | None = None,
    layers: int | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """{"workload": …, "rows": [{"stage", "seconds", "bytes"}]}: seconds on the wall until the device has finished.

    bytes: of the values that a stage goes through. Raises ConfigError for an unknown preset, and for a device that this
    machine has not got.
    """
    machine.check_device(device)
    chosen = preset_named(preset)
    width = chosen.rank if rank is None else rank
    layout = preset_shapes(chosen, layers=layers)
    start = initial_state(layout, dict.fromkeys(layout, width), seed)
    there = [_change(tensor, name, seed).to(device) for name, tensor in start.tensors().items()]
    here = [tensor.cpu() for tensor in there]
    held = start.map(lambda pair: type(pair)(pair.A.to(device), pair.B.to(device)))
    stages: dict[str, Callable[[], object]] = {
        "copy out, factor by factor": held.in_memory,
        "copy out, all together": lambda: torch.cat([tensor.flatten() for tensor in there]).cpu(),
        "choose, in memory": lambda: [top_positions(tensor.abs(), _kept(tensor)) for tensor in here],
        "choose, on the device": lambda: [_choose_there(tensor) for tensor in there],
    }
    size = 4 * sum(tensor.numel() for tensor in there)
    for call in stages.values():
        call()  # loads libraries, and on CUDA makes their handles
    taken: dict[str, list[float]] = {stage: [] for stage in stages}
    for _ in range(repeats):
        for stage, call in stages.items():
            taken[stage].append(machine.time_call(call))
    name = torch.cuda.get_device_name(device) if device != "cpu" else "cpu"
    return {
        "workload": {"name": f"{preset}, rank {width}", "device": name, "threads": torch.get_num_threads()},
        "rows": [{"stage": stage, "seconds": statistics.median(taken[stage]), "bytes": size} for stage in stages],
    }


def _change(tensor: Tensor, name: str, seed: int) -> Tensor:
    rows, columns = tensor.shape
    return heavy_tailed((rows, columns), False, derived_seed(seed, name))


def _kept(tensor: Tensor) -> int:
    return kept_count(tensor.numel(), DENSITY)


def _choose_there(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and values of the largest, in memory: the 5 % that would leave the device."""
    flat = tensor.flatten()
    positions = flat.abs().topk(_kept(tensor), sorted=False).indices.sort().values
    return positions.cpu(), flat[positions].cpu()


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The rows for a terminal."""
    work = result["workload"]
    table = Table(title=f"{work['name']} on {work['device']}, {work['threads']} threads")
    for name in ("stage", "seconds", "MiB"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for row in result["rows"]:
        table.add_row(row["stage"], f"{row['seconds']:.4f}", f"{row['bytes'] / 2**20:.1f}")
    yield table
