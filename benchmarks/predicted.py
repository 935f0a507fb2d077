"""`python -m benchmarks predicted`: what `fedloom estimate` predicts of a server's turn, beside all layers played.

An estimate plays one layer and counts it for all. Here all are played too, and the kernels alone are timed; everything
in seconds of processor time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from benchmarks import aggregate
from fedloom.studies.estimate import preset_case, run_estimate

METHODS = ("fedit", "fedsrd", "fedsrd-e", "florist")


@dataclass(frozen=True, slots=True)
class Row:
    """One method: seconds and MiB of the server's turn, as predicted and as measured on all layers.

    kernel_cpu_s: its kernels alone, on all layers. share: of the time that the machine's rates allow at least.
    """

    method: str
    predicted_cpu_s: float
    measured_cpu_s: float
    predicted_mib: float | None
    measured_mib: float | None
    kernel_cpu_s: float
    share: float


def run(
    preset: str = "tinyllama", *, rank: int = 16, clients: int = 4, methods: Sequence[str] = METHODS
) -> dict[str, Any]:
    """{"workload": …, "rows": [Row as a dict, …]}. Raises ConfigError for an unknown preset or method."""
    case = preset_case(preset, rank=rank, clients=clients)
    kernels = aggregate.run(
        preset=preset, clients=clients, rank=rank, methods=methods, all_modules=True, repeats=1, cpu_time=True
    )
    alone = {row["method"]: row for row in kernels["rows"]}  # type: ignore[attr-defined]
    told, whole = ({row["method"]: row for row in run_estimate(case, methods, whole=w)["rows"]} for w in (False, True))
    rows = [
        Row(
            method,
            told[method]["predicted_server_cpu_s"],
            whole[method]["predicted_server_cpu_s"],
            _mib(told[method]["predicted_server_bytes"]),
            _mib(whole[method]["predicted_server_bytes"]),
            alone[method]["seconds"],
            alone[method]["share"],
        )
        for method in methods
    ]
    work = {"name": f"{preset}, rank {rank}, {clients} clients", "threads": torch.get_num_threads()}
    return {"workload": work, "rows": [asdict(row) for row in rows]}


def _mib(size: float | None) -> float | None:
    return None if size is None else size / 2**20


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The rows as the documentation has them."""
    work = result["workload"]
    table = Table(title=f"{work['name']}: a server's turn predicted and measured, {work['threads']} threads")
    table.add_column("method")
    for name in ("predicted CPU s", "all layers", "ratio", "predicted MiB", "all layers", "ratio", "kernels", "share"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        seconds = _beside(row["predicted_cpu_s"], row["measured_cpu_s"], ".2f")
        sizes = _beside(row["predicted_mib"], row["measured_mib"], ".0f")
        table.add_row(row["method"], *seconds, *sizes, f"{row['kernel_cpu_s']:.3f}", f"{row['share']:.0%}")
    yield table


def _beside(told: float | None, found: float | None, spec: str) -> tuple[str, str, str]:
    if told is None or found is None:
        return "–", "–", "–"
    return format(told, spec), format(found, spec), f"{told / found:.2f}"
