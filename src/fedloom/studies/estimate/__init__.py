"""`fedloom estimate`: what a round will send and cost, before anything is trained, from the shapes of a model alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from fedloom.errors import ConfigError
from fedloom.methods.method import Method
from fedloom.methods.table import build
from fedloom.records.config import Config
from fedloom.report.baseline import play_rounds
from fedloom.studies.compare import apply_overrides, expand_variant
from fedloom.studies.estimate.case import Case as Case
from fedloom.studies.estimate.case import config_case as config_case
from fedloom.studies.estimate.case import preset_case as preset_case
from fedloom.studies.estimate.case import run_case as run_case
from fedloom.studies.estimate.case import variant_of as variant_of
from fedloom.studies.estimate.course import RunBytes, play_course
from fedloom.studies.estimate.plan import Terms, plan_run
from fedloom.studies.estimate.presets import preset_named, preset_shapes
from fedloom.studies.estimate.published import MIB, Figure, list_figures
from fedloom.studies.estimate.rounds import Course, Prediction, equal_ranks, predict
from fedloom.studies.estimate.sizes import CODINGS, PAPER
from fedloom.studies.estimate.sums import count_messages
from fedloom.studies.estimate.tables import estimate_tables as estimate_tables

DEFAULT_METHODS = ("fedit", "ffa", "fed-dare", "flora", "florist", "fedsrd", "fedsrd-e")


def run_estimate(
    case: Case, methods: Sequence[str], *, seed: int = 0, whole: bool = False, terms: Terms | None = None
) -> dict[str, Any]:
    """{"case": …, "rows": [a Prediction as a dictionary and its totals], "published": [a Figure and what we send]}.

    methods: variants as `fedloom compare` takes them. In rows, "up_bytes" and "down_bytes" are those of one update and
    one broadcast by coding, "total_bytes" those of a round in the method's own coding: of who is asked and who answers,
    with what they missed. "run_bytes" has the delivery of the result as well, and "share_of_dense" is its share of
    dense FedIT's with the same attendance. A method that cannot combine these clients has the row
    {"method", "refused": why}; alone, it raises its ConfigError. Everything but bytes and the published figures is a
    prediction from one layer of made-up updates, played now on this machine: "predicted_server_cpu_s" counts seconds of
    processor time, so that other work on the machine changes little. With `whole` every layer is played, which is slow
    and predicts nothing. "plan" is that of `plan.plan_run` for these terms; None without a run.
    """
    built = build_variants(case, methods)
    found = predict_case(case, built, seed=seed, whole=whole)
    rows = [told for told in found.values() if isinstance(told, Prediction)]
    refusals = [told for told in found.values() if isinstance(told, ConfigError)]
    if len(refusals) == len(found) == 1:
        raise refusals[0]
    dense = play_rounds(case.modules, case.ranks, ((turns.asked, turns.answering) for turns in case.rounds))
    ranks = sorted({rank for held in case.ranks.values() for rank in held.values()})
    return {
        "case": {
            "name": case.name,
            "modules": len(case.layout),
            "values": case.values,
            "clients": len(case.ranks),
            "ranks": ranks,
            "asked": case.asked,
            "rounds": len(case.rounds) if case.is_run else None,
            "note": case.note,
            "dense_bytes": dense.bytes,
            "dense_rank": dense.rank,
            "data_bytes": dict(case.data.by_client),
            "data_coding": case.data.coding,
            "threads": torch.get_num_threads(),
            "whole": whole,
        },
        "rows": [
            {"method": name, "refused": str(told)}
            if isinstance(told, ConfigError)
            else _row(told, case, dense.bytes, terms or Terms())
            for name, told in found.items()
        ],
        "published": [
            {**asdict(figure), "ours": _ours(figure, case, rows)}
            for figure in list_figures()
            if figure.preset == case.name
        ],
    }


def build_variants(case: Case, methods: Sequence[str]) -> dict[str, Method]:
    """Label → method of every variant, with the form of values that the case asks for."""
    built = {}
    for variant in methods:
        if variant in ("alone", "pooled"):
            raise ConfigError(f"{variant!r} sends nothing that an estimate could be made of; give methods")
        for label, overrides in expand_variant(Config(), variant).items():
            chosen = apply_overrides(Config(), overrides).method
            method = build(chosen.name, chosen.settings)
            built[label] = method if case.coding == "auto" else replace(method, values=case.coding, wider={})
    return built


def predict_case(
    case: Case,
    methods: Mapping[str, Method],
    *,
    seed: int = 0,
    whole: bool = False,
    with_memory: bool = True,
    codings: Sequence[str] = CODINGS,
    fading: bool = False,
) -> dict[str, Prediction | ConfigError]:
    """`predict` for a case, with what its run does to a round. fading: see `made_up.train_made_up`."""
    course = Course(fading=fading, steps=case.steps)
    if case.is_run:
        course = Course(case.asked, len(case.rounds), len(case.regions or ()), fading, case.steps)
    return predict(
        methods,
        case.layout,
        case.ranks,
        seed=seed,
        whole=whole,
        with_memory=with_memory,
        attending=case.combined,
        budget=case.budget,
        codings=codings,
        course=course,
        sums=case.sums,
    )


def play_case(told: Prediction, case: Case) -> RunBytes:
    """The bytes of the case's run, or of its one round."""
    # A merged state's rank is at most that of the matrix, beside the adapter that is trained.
    tops = case.tops
    most = sum(4 * (m + n) * (min(m, n) + tops[module]) for module, (m, n) in case.layout.items())
    return play_course(told, case.ranks, case.rounds, most, case.regions)


def _row(told: Prediction, case: Case, dense: int, terms: Terms) -> dict[str, Any]:
    course = play_case(told, case)
    rounds = len(case.rounds) if case.is_run else 0
    # Without a run: a round that is neither the first nor the last of one.
    total = (course.bytes - told.first) / (rounds - 1) if rounds > 1 else course.bytes
    if not rounds:
        total = len(case.ranks) * (told.up[told.auto] + told.down[told.auto])
        total += count_messages(tuple(case.ranks)) if told.summed else 0
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
        "delivery_bytes": round(course.delivered),
        "relayed_bytes": round(course.relayed),
        "share_of_dense": (course.bytes if rounds else total) / dense,
        "efficiency": told.efficiency,
        "plan": plan_run(case, told, course, terms) if rounds else None,
        "predicted_server_cpu_s": told.server_cpu_s,
        "predicted_client_cpu_s": told.client_cpu_s,
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
