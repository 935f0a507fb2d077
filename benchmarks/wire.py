"""`python -m benchmarks wire`: bytes against the entropy bound, seconds and error of every value coding.

The workload is one client's round: an update that keeps the 5 % largest changes of both factors, and a broadcast of one
factor under a seeded mask of 20 %. Changes are drawn from a normal law whose standard deviation is log-normal (kurtosis
8), alike everywhere or, with `structured`, scaled by log-normal factors of components and features as well. Recorded
payloads of a run can stand in for it.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from fedloom.compress.entries import Dense, Entry, Quantized, Seeded, Sparse, count, floats, to_dense
from fedloom.compress.masks import STEPS, seeded_mask
from fedloom.compress.quantize import quantize
from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError
from fedloom.studies.estimate.machine import best_seconds, time_call
from fedloom.studies.estimate.paper import paper_decode, paper_encode
from fedloom.studies.estimate.presets import preset_named, preset_shapes
from fedloom.wire import Header, Message, decode, describe, encode

KINDS = ("fp32", "bf16", "int8", "int4")
DENSITY, MASK = 0.05, round(0.2 * STEPS) / STEPS
Entries = Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Row:
    """One value coding, or "paper": its bitmap of all parameters and float32 values.

    up_bytes: the update; down_bytes: the broadcast, averaged over one of A and one of B. position_bits and entropy_bits
    are a position of the update, the bound being that of positions scattered evenly within each tensor. encode_s,
    decode_s: the update, best of several. error: ‖ΔŴ − ΔW‖ / ‖ΔW‖ (Frobenius) that the coding of values alone
    makes of ΔW = ΔB (A + ΔA), the update of a first round.
    """

    values: str
    up_bytes: int
    down_bytes: int
    total_bytes: int
    position_bits: float
    entropy_bits: float
    encode_s: float
    decode_s: float
    error: float


def run(
    preset: str = "llama-3.2-3b",
    recorded: Path | None = None,
    *,
    structured: bool = False,
    rank: int | None = None,
    layers: int | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """{"workload": …, "rows": [Row as a dict, …], "details": [bytes by part, memory, seconds of the broadcast, …]}.

    `recorded` is a folder of payloads that a run kept (`output.keep_payloads`); the other settings shape the synthetic
    workload. Raises ConfigError for an unknown preset or a folder without updates.
    """
    if recorded is None:
        modules = preset_shapes(preset_named(preset), layers=layers)
        width = preset_named(preset).rank if rank is None else rank
        up, downs = synthetic(modules, width, structured, seed)
        name = f"{preset}, rank {width}, {'row and column structure' if structured else 'no structure'}"
    else:
        up, downs = read_recorded(recorded)
        name = str(recorded)
    rows, details = [_paper_row(up, downs, repeats)], []
    for kind in KINDS:
        row, detail = _row(kind, up, downs, repeats, seed)
        rows.append(row)
        details.append(detail)
    elements = sum(count(entry.shape) for entry in up.values())
    return {
        "workload": {"name": name, "parameters": elements, "sent": sum(e.values.numel() for e in up.values())},
        "rows": [asdict(row) for row in rows],
        "details": details,
    }


def synthetic(
    modules: Mapping[str, tuple[int, int]], rank: int, structured: bool, seed: int
) -> tuple[Entries, tuple[Entries, ...]]:
    """(the entries of an update, those of a broadcast of B and of one of A), float32."""
    up: dict[str, Entry] = {}
    downs: dict[str, dict[str, Entry]] = {"B": {}, "A": {}}
    for module, (m, n) in modules.items():
        for part, shape in (("A", (rank, n)), ("B", (m, rank))):
            name = f"{module}/{part}"
            change = heavy_tailed(shape, structured, derived_seed(seed, name)).flatten()
            positions = change.abs().topk(max(round(DENSITY * change.numel()), 1)).indices.sort().values
            up[name] = Sparse(shape, positions, change[positions])
            mask_seed = derived_seed(seed, "mask", name)
            kept = change[seeded_mask(change.numel(), MASK, mask_seed)] / MASK
            downs[part][name] = Seeded(shape, mask_seed, MASK, kept)
    return up, tuple(downs.values())


def heavy_tailed(shape: tuple[int, int], structured: bool, seed: int) -> Tensor:
    """A change of a factor as the workload has it: see the top of this file."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    change = normal(*shape).mul_(normal(*shape).mul_(0.5).exp_()).mul_(1e-4)
    if structured:
        change *= (0.5 * normal(shape[0], 1)).exp() * (0.5 * normal(1, shape[1])).exp()
    return change


def read_recorded(folder: Path) -> tuple[Entries, tuple[Entries, ...]]:
    """All updates of a folder as one message, and all its broadcasts; "number/" goes before the names."""
    up: dict[str, Entry] = {}
    down: dict[str, Entry] = {}
    for number, path in enumerate(sorted(folder.glob("*.fedloom"))):
        message = decode(path.read_bytes())
        target = up if message.header.kind == "update" else down
        target |= {f"{number:05d}/{name}": _as_float32(entry) for name, entry in message.entries.items()}
    if not up:
        raise ConfigError(
            f"{folder}: no payload of an update; expected *.fedloom files that a run kept (keep_payloads)"
        )
    return up, (down,)


def _as_float32(entry: Entry) -> Entry:
    return replace(entry, values=floats(entry.values))


def _row(kind: str, up: Entries, downs: Sequence[Entries], repeats: int, seed: int) -> tuple[Row, dict[str, Any]]:
    message = _message(up, kind, seed)
    payload = encode(message)
    parts = describe(payload).parts
    sent = sum(entry.values.numel() for entry in up.values() if isinstance(entry, Sparse))
    broadcast = _message(downs[0], kind, seed)
    down = [encode(broadcast), *(encode(_message(entries, kind, seed)) for entries in downs[1:])]
    down_bytes = round(sum(map(len, down)) / len(down))
    row = Row(
        kind,
        len(payload),
        down_bytes,
        len(payload) + down_bytes,
        8 * parts["positions"] / max(sent, 1),
        entropy_bits(up),
        best_seconds(lambda: encode(message), repeats),
        best_seconds(lambda: decode(payload), repeats),
        product_error(up, message.entries),
    )
    output = sum(_output_bytes(entry) for entry in message.entries.values())
    detail = {
        "values": kind,
        "parts": dict(parts),
        "down_encode_s": best_seconds(lambda: encode(broadcast), repeats),
        "down_decode_s": best_seconds(lambda: decode(down[0]), repeats),
        "decode_output_bytes": output,
        "decode_peak_bytes": _peak_bytes(lambda: decode(payload)),
    }
    return row, detail


def _message(entries: Entries, kind: str, seed: int) -> Message:
    coded = {
        name: replace(entry, values=quantize(kind)(floats(entry.values), derived_seed(seed, kind, name)))
        for name, entry in entries.items()
    }
    return Message(Header("update", "bench", 1, 0, "0" * 32, num_examples=1), coded)


def _peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that a call holds at a time, its result included: all of it that Python and numpy allocate."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _output_bytes(entry: Entry) -> int:
    tensors = [entry.values.codes, entry.values.scales] if isinstance(entry.values, Quantized) else [entry.values]
    if isinstance(entry, Sparse):
        tensors.append(entry.positions)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _paper_row(up: Entries, downs: Sequence[Entries], repeats: int) -> Row:
    payload = paper_encode(up)
    sent = sum(entry.values.numel() for entry in up.values())
    elements = sum(count(entry.shape) for entry in up.values())
    down_bytes = round(sum(len(paper_encode(entries)) for entries in downs) / len(downs))
    shapes_of = {name: entry.shape for name, entry in up.items()}
    return Row(
        "paper",
        len(payload),
        down_bytes,
        len(payload) + down_bytes,
        elements / sent,
        entropy_bits(up),
        min(time_call(lambda: paper_encode(up)) for _ in range(min(repeats, 2))),
        min(time_call(lambda: paper_decode(payload, shapes_of)) for _ in range(min(repeats, 2))),
        0.0,
    )


def entropy_bits(entries: Entries) -> float:
    """Bits a position of sparse entries if each tensor's positions were scattered evenly over it."""
    total, sent = 0.0, 0
    for entry in entries.values():
        share = entry.values.numel() / max(count(entry.shape), 1)
        if isinstance(entry, Sparse) and 0 < share < 1:
            total -= count(entry.shape) * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
            sent += entry.values.numel()
    return total / max(sent, 1)


def product_error(exact: Entries, coded: Entries) -> float:
    """‖ΔŴ − ΔW‖ / ‖ΔW‖ over all modules; see `Row`. Dense entries are the factors themselves, others changes."""
    lost = whole = 0.0
    for name in (name for name in exact if name.endswith("A") and f"{name[:-1]}B" in exact):
        first = _factors(exact, name)
        second = _factors(coded, name)
        whole += _square_of_product(*first)
        # B̂ Â − B A = (B̂ − B) Â + B (Â − A): the differences are taken before anything is squared.
        left = torch.cat([second[0] - first[0], first[0]], dim=1)
        right = torch.cat([second[1], second[1] - first[1]])
        lost += _square_of_product(left, right)
    return math.sqrt(lost / whole) if whole else 0.0


def _factors(entries: Entries, name: str) -> tuple[Tensor, Tensor]:
    a, b = entries[name], entries[f"{name[:-1]}B"]
    start = torch.zeros(a.shape)
    if not isinstance(a, Dense):
        start.uniform_(-1.0, 1.0, generator=torch.Generator().manual_seed(derived_seed(0, name))).div_(
            a.shape[1] ** 0.5
        )
    return to_dense(b), start + to_dense(a)


def _square_of_product(left: Tensor, right: Tensor) -> float:
    """‖left @ right‖² from Gram matrices, nothing of the product's size."""
    return max(float(((left.T @ left).double() * (right @ right.T).double()).sum()), 0.0)


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The result for a terminal."""
    work = result["workload"]
    title = f"{work['name']}: {work['parameters']:,} parameters, {work['sent']:,} sent up"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    columns = ("values", "up MiB", "down MiB", "total MiB", "bits/position", "entropy", "encode s", "decode s", "error")
    for column in columns:
        table.add_column(column, justify="left" if column == "values" else "right")
    for row in result["rows"]:
        sizes = [f"{row[key] / 2**20:.2f}" for key in ("up_bytes", "down_bytes", "total_bytes")]
        bits = [f"{row[key]:.3f}" for key in ("position_bits", "entropy_bits")]
        times = [f"{row[key]:.3f}" for key in ("encode_s", "decode_s")]
        table.add_row(row["values"], *sizes, *bits, *times, f"{row['error']:.4f}")
    yield table
