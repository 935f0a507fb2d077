"""What `fedloom methods` and `fedloom inspect` print: the methods; a payload, an adapter, a run, an audit record."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from fedloom.cli.closing import run_tables
from fedloom.errors import ConfigError
from fedloom.records.text import cell

if TYPE_CHECKING:
    from fedloom.lora.pair import LoraPair
    from fedloom.wire.describe import TensorBytes

MethodRow = Mapping[str, Any]


def method_rows() -> list[MethodRow]:
    """Each method: its name, the facts of `method.Facts`, its settings with their defaults, its presets.

    server_options: those of a server optimiser, where the method takes one; "server_optimizer" is None, that is off.
    """
    from fedloom.methods.table import METHODS, build, method_options, server_options

    return [
        {
            "name": name,
            **asdict(build(name).facts),
            "settings": _plain(method_options(name)),
            "server_options": _plain(server_options(name)),
            "presets": {preset: _plain(settings) for preset, settings in entry.presets.items()},
        }
        for name, entry in METHODS.items()
    ]


def method_table(rows: Sequence[MethodRow]) -> RenderableType:
    """The rows for a terminal: what each method does, then the settings of each."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("method", "paper", "exact", "unequal ranks", "sends", "receives", "keeps"):
        table.add_column(name, style="bold" if name == "method" else "", overflow="fold")
    settings = Table(box=None, show_header=False, title="Settings: --set method.KEY=VALUE", title_justify="left")
    for row in rows:
        exact = "yes" if row["exact"] else "no"
        ranks = "no" if not row["unequal_ranks"] else "own part" if row["own_part"] else "whole"
        table.add_row(row["name"], row["paper"], exact, ranks, row["sends"], row["receives"], row["keeps"])
        shown = [f"{key} = {_toml(value)}" for key, value in row["settings"].items()]
        shown += ["server_optimizer (below)"] * bool(row["server_options"])
        presets = f"  (presets: {', '.join(row['presets'])})" if row["presets"] else ""
        settings.add_row(row["name"], (", ".join(shown) or "none") + presets)
    legend = (
        "unequal ranks, what a client of lower rank trains on: the whole adapter of the server, of which it trains the "
        "first components; or its own part of it, the first components alone\n"
    )
    return Group(table, legend, settings, *_server_optimisers(rows), *_other_names())


def _server_optimisers(rows: Sequence[MethodRow]) -> list[str]:
    """What a server optimiser is, its settings, and the methods that take one."""
    from fedloom.methods.table import SERVER_OPTIMISERS

    taking = {row["name"]: row["server_options"] for row in rows if row["server_options"]}
    if not taking:
        return []
    more = {key: value for key, value in next(iter(taking.values())).items() if key != "server_optimizer"}
    return [
        "",
        f"Server optimiser, off unless set: method.server_optimizer = {' or '.join(map(_quoted, SERVER_OPTIMISERS))}",
        f"  with {', '.join(f'{key} = {_toml(value)}' for key, value in more.items())}",
        f"  over the mean of {', '.join(taking)}; docs/methods/index.md explains it",
    ]


def _other_names() -> list[str]:
    from fedloom.methods.table import ALIASES

    return ["", *(f"{other} is another name of {name}: {what}" for other, (name, what) in ALIASES.items())]


def _quoted(text: str) -> str:
    return f'"{text}"'


def describe_path(path: Path) -> RenderableType:
    """What is at `path`. Raises the error that says why it is none of what is known."""
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file or folder; expected a payload, or the folder of an adapter, a run or an audit"
        )
    return next(show for fits, show in _KINDS if fits(path))(path)


def adapter_table(folder: Path) -> RenderableType:
    """The modules of a PEFT adapter by kind: how many, shape of ΔW, ranks, values, mean norm of ΔW."""
    from fedloom.adapters.folder import load_adapter

    state, opened = load_adapter(folder)
    kinds: dict[tuple[str, tuple[int, int]], list[str]] = defaultdict(list)
    for module, shape in state.shapes().items():
        kinds[module.rpartition(".")[2], shape].append(module)
    title = cell(f"adapter of {opened.base_model or 'an unnamed base'}", "bold")
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("modules")
    for name in ("number", "shape", "ranks", "values", "mean ‖ΔW‖"):
        table.add_column(name, justify="right")
    for (kind, (m, n)), modules in sorted(kinds.items()):
        pairs = [state[module] for module in modules]
        ranks = sorted({pair.rank for pair in pairs})
        values = sum(pair.A.numel() + pair.B.numel() for pair in pairs)
        norm = sum(_norm(pair) for pair in pairs) / len(pairs)
        row = (str(len(modules)), f"{m} × {n}", ", ".join(map(str, ranks)), f"{values:,}", f"{norm:.4g}")
        table.add_row(cell(kind), *row)
    table.add_row("all", str(len(state)), "", "", f"{state.numel():,}", "", style="bold")
    return table


def payload_tables(path: Path) -> RenderableType:
    """The header of one payload, its tensors by kind with their density, codings and bytes, and its parts."""
    from fedloom.compress.entries import count
    from fedloom.wire import describe

    told = describe(path.read_bytes())
    facts = Table(box=None, show_header=False, title=f"payload of {told.size:,} bytes", title_style="bold")
    for key, value in {**asdict(told.header), "checksum": told.checksum}.items():
        facts.add_row(key, cell(str(value)))
    kinds: dict[tuple[str, str], list[TensorBytes]] = defaultdict(list)
    for tensor in told.tensors:
        module, _, part = tensor.name.rpartition("/")
        coding = f"{tensor.form} {tensor.coding}, {tensor.positions.partition(' ')[0]}"
        kinds[f"{module.rpartition('.')[2]}/{part}", coding].append(tensor)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("tensors", no_wrap=True)
    table.add_column("form, positions")
    for column in ("number", "sent", "density", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    for kind, tensors in sorted(kinds.items()):
        sent, elements = sum(t.values for t in tensors), sum(count(t.shape) for t in tensors)
        density = f"{100 * sent / elements:.2f} %" if elements else "–"
        spent = sum(t.value_bytes + t.position_bytes for t in tensors)
        table.add_row(*map(cell, kind), str(len(tensors)), f"{sent:,}", density, f"{spent:,.0f}")
    parts = Table(box=box.SIMPLE_HEAD)
    parts.add_column("part")
    parts.add_column("bytes", justify="right")
    for part, size in told.parts.items():
        parts.add_row(part, f"{size:,}")
    return Group(facts, table, parts)


def audit_table(folder: Path) -> RenderableType:
    """What has left a site, job by job, after the record was checked: every line, and every payload still kept."""
    from fedloom.site.audit import AuditTrail
    from fedloom.site.summary import summarise_record

    lines, moved, unlisted = AuditTrail(folder).verify()
    table = Table(box=box.SIMPLE_HEAD, title="what has left this site", title_style="bold")
    table.add_column("job", no_wrap=True)
    for name in ("rounds", "payloads", "bytes", "without noise", "last day"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in dict.fromkeys(line.job for line in lines if line.payload):
        told = [line for line in lines if line.job == job and line.payload]
        bare = sum(line.mu is None for line in told)
        rounds, size = len({line.round for line in told}), sum(line.bytes for line in told)
        table.add_row(cell(job), str(rounds), str(len(told)), f"{size:,}", str(bare), cell(told[-1].time[:10]))
    return Group(table, *map(cell, summarise_record(lines, moved, unlisted)))


def _norm(pair: LoraPair) -> float:
    """‖B A‖_F from the r × r Gram matrices, or from the m × n product where that is smaller."""
    a, b = pair.A.double(), pair.B.double()
    if pair.rank**2 > pair.shape[0] * pair.shape[1]:
        return float((b @ a).norm())
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def _plain(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings as JSON has them: without a default "required", and "inf" for infinity."""
    words = ((inspect.Parameter.empty, "required"), (math.inf, "inf"))
    return {key: next((word for odd, word in words if value == odd), value) for key, value in settings.items()}


def _toml(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], RenderableType]], ...] = (
    (lambda path: (path / "ledger.jsonl").is_file(), run_tables),
    (lambda path: (path / "audit.jsonl").is_file(), audit_table),
    (Path.is_dir, adapter_table),
    (Path.is_file, payload_tables),
)
"""What a path may be, tried in order, and what to show of it."""
