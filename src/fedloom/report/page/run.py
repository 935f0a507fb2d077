"""One run as a page sees it, and runs that differ in their seed only, under one name."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.records.ledger import Row
from fedloom.records.text import to_printable
from fedloom.report.numbers import Report
from fedloom.report.prediction import ComparedRow
from fedloom.report.standing import Standing

_APART = ("local", "flower", "output")
"""Sections that say where and how a run is played: its outcome does not rest on them."""
_NAMED = 3
"""Settings that a variant's name has at most."""


@dataclass(frozen=True, eq=False, slots=True)
class PageRun:
    """A run: its folder, what it comes to, its rows, how it stands now, what was predicted beside what was measured.

    standing: None where it is over and nobody asks.
    """

    folder: Path
    report: Report
    rows: Sequence[Row]
    standing: Standing | None = None
    compared: Sequence[ComparedRow] = ()

    @property
    def is_over(self) -> bool:
        """Whether no rows are to come."""
        return self.standing is None or self.standing.is_over

    @property
    def settings(self) -> str:
        """Those of its last session, as TOML; "" where the ledger does not say."""
        sessions = self.report.facts.sessions
        return sessions[-1].settings if sessions else ""


@dataclass(frozen=True, eq=False, slots=True)
class Variant:
    """Runs that differ in their seed only. slot: its colour."""

    name: str
    runs: Sequence[PageRun]
    slot: int

    @property
    def reports(self) -> list[Report]:
        """Those of its runs."""
        return [run.report for run in self.runs]


def group_runs(runs: Sequence[PageRun]) -> list[Variant]:
    """The runs by variant, in the order in which they were given. A variant is called by its method and by the settings
    in which it differs from others of that method.
    """
    groups: dict[str, list[PageRun]] = {}
    for run in runs:
        groups.setdefault(_identity(run), []).append(run)
    told = [_flatten(_outcome_settings(group[0])) for group in groups.values()]
    names: list[str] = []
    for own, group in zip(told, groups.values(), strict=True):
        method = group[0].report.run.method
        alike = [
            other for other, them in zip(told, groups.values(), strict=True) if them[0].report.run.method == method
        ]
        names.append(_name_variant(method, own, alike, group[0].folder))
    return [
        Variant(name if names.count(name) == 1 else f"{name} ({number + 1})", group, number)
        for number, (name, group) in enumerate(zip(names, groups.values(), strict=True))
    ]


def _name_variant(method: str, own: Mapping[str, str], alike: Sequence[Mapping[str, str]], folder: Path) -> str:
    if len(alike) == 1:
        return to_printable(method)
    differing = [key for key, value in own.items() if any(other.get(key) != value for other in alike)]
    if not differing:  # an older ledger, or one that lacks what the others have set
        return to_printable(f"{method}, {folder.name}")
    said = [f"{key.removeprefix('method.')}={own[key]}" for key in differing[:_NAMED]]
    return to_printable(f"{method} {', '.join(said)}{', …' if len(differing) > _NAMED else ''}", 100)


def _identity(run: PageRun) -> str:
    """The same for runs that differ in their seed, and in where they were played, alone."""
    settings = _outcome_settings(run)
    if settings:
        return json.dumps(settings, sort_keys=True, default=str)
    told = run.report.run
    return json.dumps([told.method, told.model, told.clients, told.num_rounds, told.adapter_values])


def _outcome_settings(run: PageRun) -> dict[str, Any]:
    """The settings without the seed and without what the outcome does not rest on."""
    try:
        found = tomllib.loads(run.settings)
    except tomllib.TOMLDecodeError:
        return {}
    for section in _APART:
        found.pop(section, None)
    federation = found.get("federation")
    if isinstance(federation, dict):
        federation.pop("seed", None)
    return found


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Key with dots → value as text."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found
