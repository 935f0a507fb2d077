"""What is estimated: a federation by its shapes, its ranks and its turns."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from fedloom.compress.budget import Budget
from fedloom.errors import ConfigError
from fedloom.methods.table import build
from fedloom.model.volume import Volume, weigh_examples
from fedloom.records.config import Config
from fedloom.records.configfile import parse
from fedloom.records.ledger import ModuleGroup, RunRow, read_rows
from fedloom.records.quantities import parse_budget
from fedloom.records.session import Session
from fedloom.report.baseline import group_modules
from fedloom.server.attendance import Attendance
from fedloom.studies.estimate.made_up import Ranks
from fedloom.studies.estimate.presets import preset_named, preset_shapes
from fedloom.studies.estimate.rounds import equal_ranks
from fedloom.studies.estimate.schedule import Turns, draw_turns, turns_of
from fedloom.workspace.regions import plan_regions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNKNOWN = "full states after federation.consolidate_every are taken to be as large as before"
_SUMMED = "privacy.secure_aggregation: an update has privacy.bits for every value that may travel, whatever its form"
_WIDTHS = {"bfloat16": 2, "float16": 2}
"""Bytes of a weight by model.dtype, where it is not 4."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is estimated: a name, the adapted modules with their (m, n), every client's ranks.

    attendance: of every round of the run, if there is one; coding: form of all values, "auto" for that of each method;
    budget: wire.budget; baseline_r: rank of the dense run that bytes are compared with, None for the largest; data:
    what the clients' examples weigh. turns: of every round, where they are not those of `attendance`; regions: whose
    servers sum the updates. method: that of the settings, as a variant. base_bytes: of the base model's weights, 0
    where they are not known. note: what the settings led to, in words. waits: whether a round ends with its last turn.
    steps: of a client in a round. sums: the settings of a run whose server learns sums alone; None for others.
    """

    name: str
    layout: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, Ranks]
    attendance: Sequence[Attendance] = ()
    coding: str = "auto"
    budget: Budget | None = None
    baseline_r: int | None = None
    data: Volume = Volume()
    turns: Sequence[Turns] = ()
    regions: Mapping[str, Sequence[str]] | None = None
    method: str = ""
    base_bytes: int = 0
    note: str = ""
    waits: bool = True
    steps: int = 10
    sums: Config | None = None

    @property
    def asked(self) -> int:
        """Clients that have a turn in a round, on the mean."""
        return round(fmean(len(present.asked) for present in self.rounds))

    @property
    def combined(self) -> int:
        """Updates that the server averages in a round, on the mean."""
        return max(1, round(fmean(len(present.combined) for present in self.rounds)))

    @property
    def is_run(self) -> bool:
        """Whether it is of a run, not of one round alone."""
        return bool(self.turns or self.attendance)

    @property
    def rounds(self) -> Sequence[Turns]:
        """Of the run; where there is none one round of all clients, whose result everybody receives."""
        everybody = tuple(self.ranks)
        return self.turns or list(turns_of(self.attendance)) or [Turns(everybody, everybody, everybody)]

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
    rounds: int | None = None,
) -> Case:
    """A well-known model; `ranks` gives a rank to each client. Raises ConfigError for what it does not have.

    rounds: of a run that everybody attends, if there is one.
    """
    chosen = preset_named(preset)
    held = list(ranks) if ranks else [chosen.rank if rank is None else rank] * clients
    if not held or min(held) < 1:
        raise ConfigError(f"ranks {held}: expected at least one client, and ranks of 1 or more")
    layout = preset_shapes(chosen, modules)
    found = equal_ranks(layout, held)
    everybody = tuple(found)
    return Case(preset, layout, found, turns=[Turns(everybody, everybody, everybody)] * (rounds or 0))


def config_case(config: Config) -> Case:
    """The federation that settings describe: its model's shapes, its clients and their ranks; no weights are read."""
    from fedloom.model.base import empty_base
    from fedloom.workspace.data import client_examples
    from fedloom.workspace.participants import select_participants

    texts = select_participants(client_examples(config)[0], config.federation.participants)
    data = weigh_examples(texts)
    return _place_case(config, empty_base(config.model.path), tuple(texts), data)


def run_case(folder: Path) -> Case:
    """The federation of a run that has begun, from its ledger alone and the shapes of its model."""
    from fedloom.model.base import empty_base

    rows = read_rows(folder / "ledger.jsonl")
    run = next((row for row in reversed(rows) if isinstance(row, RunRow)), None)
    session = next((row for row in reversed(rows) if isinstance(row, Session)), None)
    if run is None or session is None:
        raise ConfigError(f"{folder} holds no run that has begun: expected a ledger.jsonl with its first rows")
    config = parse(tomllib.loads(session.settings), f"the settings in {folder / 'ledger.jsonl'}")
    data = Volume(run.data_bytes, run.data_coding)
    return _place_case(config, empty_base(config.model.path), run.clients, data)


def _place_case(config: Config, base: PreTrainedModel, clients: tuple[str, ...], data: Volume) -> Case:
    from fedloom.model.peft_bridge import linear_modules
    from fedloom.model.placement import place_adapter
    from fedloom.workspace.clients import place_client, place_shared
    from fedloom.workspace.spending import spend_client_budget

    linear, method = linear_modules(base), build(config.method.name, config.method.settings)
    config, spent = spend_client_budget(linear, config, data.by_client.values() or None, len(clients), method)
    method = build(config.method.name, config.method.settings) if spent else method
    common = place_adapter(linear, config.lora)
    own = {client: place_client(linear, config, client) if client in config.clients else common for client in clients}
    ranks = {client: adapter.ranks for client, adapter in own.items()}
    trained = {module for held in ranks.values() for module in held}
    hidden = _SUMMED if config.privacy.secure_aggregation else ""
    return Case(
        config.model.path,
        place_shared(linear, common, trained).shapes,
        ranks,
        coding=config.wire.values,
        budget=Budget(*parse_budget(config.wire.budget)) if config.wire.budget else None,
        baseline_r=config.output.baseline_r,
        data=data,
        turns=draw_turns(config, clients, method),
        regions=plan_regions(config.federation.regions, clients, method),
        method=variant_of(config),
        base_bytes=sum(weight.numel() for weight in base.parameters()) * _WIDTHS.get(config.model.dtype, 4),
        note="; ".join(filter(None, (spent, _UNKNOWN if config.federation.consolidate_every else "", hidden))),
        waits=config.federation.mode == "synchronous",
        steps=config.training.max_steps or 10,
        sums=config if hidden else None,
    )


def variant_of(config: Config) -> str:
    """The method of the settings as a variant."""
    preset = [config.method.preset] if config.method.preset else []
    own = [f"{key}={value}" for key, value in config.method.settings.items() if key != "preset"]
    return ":".join([config.method.name, *([",".join([*preset, *own])] if preset or own else [])])
