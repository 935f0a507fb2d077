"""`fedloom estimate`: what a round will send and cost, before anything is trained, from the shapes of a model alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich import box
from rich.table import Table

from fedloom.errors import ConfigError
from fedloom.methods.table import build
from fedloom.records.config import Config
from fedloom.records.text import cell, to_printable
from fedloom.studies.compare import apply_overrides, expand_variant
from fedloom.studies.estimate.presets import preset_named, preset_shapes
from fedloom.studies.estimate.published import MIB, Figure, list_figures
from fedloom.studies.estimate.rounds import CODINGS, PAPER, Prediction, Ranks, equal_ranks, predict

DEFAULT_METHODS = ("fedit", "ffa", "fed-dare", "flora", "florist", "fedsrd", "fedsrd-e")


@dataclass(frozen=True, slots=True)
class Case:
    """What is estimated: a name, the adapted modules with their (m, n), every client's ranks.

    rounds: of the run, if there is one; coding: form of all values, "auto" for that of each method.
    """

    name: str
    layout: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, Ranks]
    rounds: int | None = None
    coding: str = "auto"

    @property
    def tops(self) -> dict[str, int]:
        """The largest rank of every module."""
        return {module: max(held.get(module, 0) for held in self.ranks.values()) for module in self.layout}

    @property
    def values(self) -> int:
        """Adapter values of the server: of the largest rank of every module."""
        tops = self.tops
        return sum((m + n) * tops[module] for module, (m, n) in self.layout.items())

    @property
    def modules(self) -> Sequence[ModuleGroup]:
        """What is adapted, at the rank of the dense run that bytes are compared with."""
        tops = self.tops
        groups = group_modules({module: (shape, tops[module]) for module, shape in self.layout.items()}, self.ranks)
        return [replace(group, rank=self.baseline_r) for group in groups] if self.baseline_r else groups


def preset_case(
    preset: str,
    *,
    rank: int | None = None,
    ranks: Sequence[int] | None = None,
    clients: int = 4,
    modules: Sequence[str] | None = None,
) -> Case:
    """A well-known model; `ranks` gives a rank to each client. Raises ConfigError for what it does not have."""
    chosen = preset_named(preset)
    held = list(ranks) if ranks else [chosen.rank if rank is None else rank] * clients
    if not held or min(held) < 1:
        raise ConfigError(f"ranks {held}: expected at least one client, and ranks of 1 or more")
    layout = preset_shapes(chosen, modules)
    return Case(preset, layout, equal_ranks(layout, held))


def config_case(config: Config) -> Case:
    """The federation that settings describe: its model's shapes, its clients and their ranks; no weights are read."""
    from fedloom.model.base import empty_base
    from fedloom.model.placement import linear_modules, place_adapter
    from fedloom.studies.compare import client_names
    from fedloom.workspace.clients import place_client

    linear = linear_modules(empty_base(config.model.path))
    ranks = {client: place_client(linear, config, client).ranks for client in client_names(config)}
    shapes = place_adapter(linear, config.lora).shapes
    return Case(config.model.path, shapes, ranks, config.federation.num_rounds, config.wire.values)


def variant_of(config: Config) -> str:
    """The method of the settings as a variant."""
    preset = [config.method.preset] if config.method.preset else []
    own = [f"{key}={value}" for key, value in config.method.settings.items() if key != "preset"]
    return ":".join([config.method.name, *([",".join([*preset, *own])] if preset or own else [])])


def run_estimate(case: Case, methods: Sequence[str], *, seed: int = 0, whole: bool = False) -> dict[str, Any]:
    """{"case": …, "rows": [a Prediction as a dictionary and its totals], "published": [a Figure and what we send]}.

    methods: variants as `fedloom compare` takes them. In rows, "up_bytes" and "down_bytes" are those of one client by
    coding, "total_bytes" those of a round of all clients in the method's own coding. Everything but bytes and the
    published figures is a prediction from one layer of made-up updates, timed now on this machine; with `whole` every
    layer is played, which is slow and predicts nothing.
    """
    built = {}
    for variant in methods:
        if variant in ("alone", "pooled"):
            raise ConfigError(f"{variant!r} sends nothing that an estimate could be made of; give methods")
        for label, overrides in expand_variant(Config(), variant).items():
            chosen = apply_overrides(Config(), overrides).method
            method = build(chosen.name, chosen.settings)
            built[label] = method if case.coding == "auto" else replace(method, values=case.coding)
    rows = predict(built, case.layout, case.ranks, seed=seed, whole=whole)
    ranks = sorted({rank for held in case.ranks.values() for rank in held.values()})
    return {
        "case": {
            "name": case.name,
            "modules": len(case.layout),
            "values": case.values,
            "clients": len(case.ranks),
            "ranks": ranks,
            "rounds": case.rounds,
            "threads": torch.get_num_threads(),
            "whole": whole,
        },
        "rows": [_row(told, case) for told in rows],
        "published": [
            {**asdict(figure), "ours": _ours(figure, case, rows)}
            for figure in list_figures()
            if figure.preset == case.name
        ],
    }


def _row(told: Prediction, case: Case) -> dict[str, Any]:
    clients = len(case.ranks)
    total = clients * (told.up[told.auto] + told.down[told.auto])
    later = case.rounds and told.first + (case.rounds - 1) * total
    return {
        "method": told.method,
        "auto": told.auto,
        "up_bytes": {coding: round(size) for coding, size in told.up.items()},
        "down_bytes": {coding: round(size) for coding, size in told.down.items()},
        "total_bytes": round(total),
        "first_round_bytes": round(told.first),
        "run_bytes": later and round(later),
        "efficiency": told.efficiency,
        "predicted_server_s": told.server_s,
        "predicted_server_bytes": told.memory and round(told.memory),
    }


def _ours(figure: Figure, case: Case, rows: Sequence[Prediction]) -> dict[str, float] | None:
    """What our wire takes where the paper has its figure, by coding (MiB), or the efficiency of our broadcast.

    None where the estimate is of another rank, other modules or another number of clients, or lacks the method.
    """
    same = equal_ranks(preset_shapes(preset_named(figure.preset), figure.modules), [figure.rank] * figure.clients)
    told = next((row for row in rows if row.method == figure.method), None)
    if told is None or list(case.ranks.values()) != list(same.values()):
        return None
    if figure.way == "efficiency":
        return None if told.efficiency is None else {"efficiency": told.efficiency}
    ways = {"up": (told.up,), "down": (told.down,), "both": (told.up, told.down)}[figure.way]
    return {coding: sum(way[coding] for way in ways) / MIB for coding in (PAPER, *CODINGS)}


def estimate_tables(result: Mapping[str, Any]) -> list[Table]:
    """What `run_estimate` returned, for a terminal."""
    return [_round_table(result), *([_published_table(result)] if result["published"] else [])]


def _round_table(result: Mapping[str, Any]) -> Table:
    case = result["case"]
    ranks = ", ".join(map(str, case["ranks"]))
    title = (
        f"{to_printable(case['name'], 100)}: {case['clients']} clients, rank {ranks}, {case['modules']} modules, "
        f"{case['values']:,} values. MiB of one client and round, up + down; really encoded, of made-up updates"
    )
    table = Table(
        box=box.SIMPLE_HEAD,
        title=cell(title, "bold"),
        caption="all: a round of all clients in the coding before it, wire.values. Seconds and memory of the "
        + (
            "server: measured, every layer"
            if case["whole"]
            else "server are predictions: one layer timed now times the layers"
        )
        + f", {case['threads']} threads",
    )
    table.add_column("method", overflow="fold")
    for name in (PAPER, *CODINGS, "auto", "all", "1 / Σ rank", "server s", "MiB"):
        table.add_column(name, justify="right", overflow="fold")
    for row in result["rows"]:
        sizes = [f"{row['up_bytes'][c] / MIB:.1f} + {row['down_bytes'][c] / MIB:.1f}" for c in (PAPER, *CODINGS)]
        table.add_row(
            cell(row["method"]),
            *sizes,
            row["auto"],
            f"{row['total_bytes'] / MIB:.1f}",
            _scientific(row["efficiency"]),
            f"{row['predicted_server_s']:.2f}",
            "–" if row["predicted_server_bytes"] is None else f"{row['predicted_server_bytes'] / MIB:,.0f}",
        )
    return table


def _published_table(result: Mapping[str, Any]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Published figures: MiB of one client and round, or 1 / Σ rank",
        title_style="bold",
        caption="ours: really encoded; – where the estimate is of other ranks, modules or clients, or lacks the method",
    )
    numbers = ("published", "computed", "ours, its coding", "fp32", "int4")
    for name in ("paper", "rank", "method", "way", *numbers, "formula"):
        table.add_column(name, justify="right" if name in numbers else "left")
    for row in result["published"]:
        ours = row["ours"] or {}
        show = _scientific if row["way"] == "efficiency" else _mib
        table.add_row(
            row["paper"],
            f"{row['rank']}, K = {row['clients']}",
            row["method"],
            row["way"],
            show(row["published"]),
            show(row["computed"]),
            show(ours.get(PAPER, ours.get("efficiency"))),
            _mib(ours.get("fp32")),
            _mib(ours.get("int4")),
            row["formula"],
        )
    return table


def _mib(size: float | None) -> str:
    return "–" if size is None else f"{size:.1f}"


def _scientific(value: float | None) -> str:
    return "–" if value is None else f"{1e4 * value:.2f}e-4"
