"""`fedloom estimate`: what a round will send and cost, before anything is trained, from the shapes of a model alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch

from fedloom.compress.budget import Budget
from fedloom.errors import ConfigError
from fedloom.methods.table import build
from fedloom.model.volume import Volume, weigh_examples
from fedloom.records.config import Config
from fedloom.records.ledger import ModuleGroup
from fedloom.records.quantities import parse_budget
from fedloom.report.baseline import group_modules, play_rounds
from fedloom.server.attendance import Attendance, draw_rounds
from fedloom.studies.compare import apply_overrides, expand_variant
from fedloom.studies.estimate.course import play_course
from fedloom.studies.estimate.made_up import Ranks
from fedloom.studies.estimate.presets import preset_named, preset_shapes
from fedloom.studies.estimate.published import MIB, Figure, list_figures
from fedloom.studies.estimate.rounds import CODINGS, PAPER, Prediction, equal_ranks, predict
from fedloom.studies.estimate.tables import estimate_tables as estimate_tables

DEFAULT_METHODS = ("fedit", "ffa", "fed-dare", "flora", "florist", "fedsrd", "fedsrd-e")


@dataclass(frozen=True, slots=True)
class Case:
    """What is estimated: a name, the adapted modules with their (m, n), every client's ranks.

    attendance: of every round of the run, if there is one; coding: form of all values, "auto" for that of each method;
    budget: wire.budget; baseline_r: rank of the dense run that bytes are compared with, None for the largest; data:
    what the clients' examples weigh.
    """

    name: str
    layout: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, Ranks]
    attendance: Sequence[Attendance] = ()
    coding: str = "auto"
    budget: Budget | None = None
    baseline_r: int | None = None
    data: Volume = Volume()

    @property
    def asked(self) -> int:
        """Clients that are asked in a round."""
        return len(self.attendance[0].asked) if self.attendance else len(self.ranks)

    @property
    def answering(self) -> int:
        """Clients that answer in a round, on the mean."""
        return max(1, round(fmean(len(present.answering) for present in self.rounds)))

    @property
    def rounds(self) -> Sequence[Attendance]:
        """Of the run; where there is none one round of all clients, whose result everybody receives."""
        return self.attendance or [Attendance(tuple(self.ranks), frozenset())]

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
    from fedloom.model.peft_bridge import linear_modules
    from fedloom.model.placement import place_adapter
    from fedloom.workspace.assemble import select_participants
    from fedloom.workspace.clients import place_client, place_shared
    from fedloom.workspace.data import client_examples

    if config.wire.client_budget:
        raise ConfigError(
            "an estimate is of a rank and a payload, and wire.client_budget has the method choose both: `fedloom run` "
            "says before its first round what it chose; set lora.r and wire.budget to that here"
        )
    linear = linear_modules(empty_base(config.model.path))
    texts = select_participants(client_examples(config)[0], config.federation.participants)
    ranks = {client: place_client(linear, config, client).ranks for client in texts}
    trained = {module for held in ranks.values() for module in held}
    return Case(
        config.model.path,
        place_shared(linear, place_adapter(linear, config.lora), trained).shapes,
        ranks,
        tuple(draw_rounds(config, tuple(texts))),
        config.wire.values,
        Budget(*parse_budget(config.wire.budget)) if config.wire.budget else None,
        config.output.baseline_r,
        weigh_examples(texts),
    )


def variant_of(config: Config) -> str:
    """The method of the settings as a variant."""
    preset = [config.method.preset] if config.method.preset else []
    own = [f"{key}={value}" for key, value in config.method.settings.items() if key != "preset"]
    return ":".join([config.method.name, *([",".join([*preset, *own])] if preset or own else [])])


def run_estimate(case: Case, methods: Sequence[str], *, seed: int = 0, whole: bool = False) -> dict[str, Any]:
    """{"case": …, "rows": [a Prediction as a dictionary and its totals], "published": [a Figure and what we send]}.

    methods: variants as `fedloom compare` takes them. In rows, "up_bytes" and "down_bytes" are those of one update and
    one broadcast by coding, "total_bytes" those of a round in the method's own coding: of who is asked and who answers,
    with what they missed. "run_bytes" has the delivery of the result as well, and "share_of_dense" is its share of
    dense FedIT's with the same attendance. A method that cannot combine these clients has the row
    {"method", "refused": why}; alone, it raises its ConfigError. Everything but bytes and the published figures is a
    prediction from one layer of made-up updates, played now on this machine: "predicted_server_cpu_s" counts seconds of
    processor time, so that other work on the machine changes little. With `whole` every layer is played, which is slow
    and predicts nothing.
    """
    built = {}
    for variant in methods:
        if variant in ("alone", "pooled"):
            raise ConfigError(f"{variant!r} sends nothing that an estimate could be made of; give methods")
        for label, overrides in expand_variant(Config(), variant).items():
            chosen = apply_overrides(Config(), overrides).method
            method = build(chosen.name, chosen.settings)
            built[label] = method if case.coding == "auto" else replace(method, values=case.coding, wider={})
    found = predict(
        built, case.layout, case.ranks, seed=seed, whole=whole, attending=case.answering, budget=case.budget
    )
    rows = [told for told in found.values() if isinstance(told, Prediction)]
    refusals = [told for told in found.values() if isinstance(told, ConfigError)]
    if len(refusals) == len(found) == 1:
        raise refusals[0]
    dense = play_rounds(case.modules, case.ranks, ((present.asked, present.answering) for present in case.rounds))
    ranks = sorted({rank for held in case.ranks.values() for rank in held.values()})
    return {
        "case": {
            "name": case.name,
            "modules": len(case.layout),
            "values": case.values,
            "clients": len(case.ranks),
            "ranks": ranks,
            "asked": case.asked,
            "rounds": len(case.attendance) or None,
            "dense_bytes": dense.bytes,
            "dense_rank": dense.rank,
            "data_bytes": dict(case.data.by_client),
            "data_coding": case.data.coding,
            "threads": torch.get_num_threads(),
            "whole": whole,
        },
        "rows": [
            {"method": name, "refused": str(told)} if isinstance(told, ConfigError) else _row(told, case, dense.bytes)
            for name, told in found.items()
        ],
        "published": [
            {**asdict(figure), "ours": _ours(figure, case, rows)}
            for figure in list_figures()
            if figure.preset == case.name
        ],
    }


def _row(told: Prediction, case: Case, dense: int) -> dict[str, Any]:
    # A merged state's rank is at most that of the matrix, beside the adapter that is trained.
    tops = case.tops
    most = sum(4 * (m + n) * (min(m, n) + tops[module]) for module, (m, n) in case.layout.items())
    course = play_course(told, case.ranks, case.rounds, most)
    rounds = len(case.attendance)
    # Without a run: a round that is neither the first nor the last of one.
    total = (course.bytes - told.first) / (rounds - 1) if rounds > 1 else course.bytes
    if not rounds:
        total = len(case.ranks) * (told.up[told.auto] + told.down[told.auto])
    return {
        "method": told.method,
        "auto": told.auto,
        "up_bytes": {coding: round(size) for coding, size in told.up.items()},
        "down_bytes": {coding: round(size) for coding, size in told.down.items()},
        "total_bytes": round(total),
        "first_round_bytes": round(told.first),
        "run_bytes": round(course.bytes) if rounds else None,
        "turn_up_bytes": round(course.up / max(course.turns, 1)),
        "turn_down_bytes": round(course.down / max(course.turns, 1)),
        "delivery_bytes": round(course.delivery),
        "share_of_dense": (course.bytes if rounds else total) / dense,
        "efficiency": told.efficiency,
        "predicted_server_cpu_s": told.server_cpu_s,
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
