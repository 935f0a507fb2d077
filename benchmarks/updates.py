"""`python -m benchmarks updates`: what the changes look like that clients train, since every compression rests on it.

A run is played as its settings say, and the change of every client in every module is looked at before anything of it
is left out. Clients of unequal rank are compared in the leading components that all of them have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from fedloom.compress.sparsify import importance, kept_count, kurtosis, top_positions
from fedloom.lora.lowrank import frobenius_norm, inner_product, truncate
from fedloom.lora.pair import PARTS, LoraPair, LoraState, narrow, stack_pairs
from fedloom.methods.method import State
from fedloom.records.config import Config
from fedloom.records.events import Silent
from fedloom.rounds.turns import ClientTurn
from fedloom.server.local import LocalSites
from fedloom.server.loop import Rounds
from fedloom.workspace.assemble import load_setup
from fedloom.workspace.folder import RunFolder

ENERGY = 0.9
"""The share of a change's energy that its rank is counted to."""


@dataclass(frozen=True, eq=False, slots=True)
class Look:
    """One client's change of one module, by factor.

    tails: Pearson kurtosis of the importance. supports: positions of the most important elements. held: their share of
    the squared norm. product: B′ A′ − B A. rank: the components that hold `ENERGY` of it. condition: σ₁ / σ_r of B′.
    """

    tails: Mapping[str, float]
    supports: Mapping[str, Tensor]
    held: Mapping[str, float]
    product: LoraPair
    rank: int
    condition: float

    @classmethod
    def at(cls, before: LoraPair, after: LoraPair, density: float) -> Look:
        """Look at the share `density` of the elements."""
        changes = {"A": after.A - before.A, "B": after.B - before.B}
        scores = {"A": importance(changes["A"], after.B, "A"), "B": importance(changes["B"], before.A, "B")}
        supports = {part: top_positions(scores[part], kept_count(scores[part].numel(), density)) for part in PARTS}
        product = stack_pairs([after, LoraPair(before.A, -before.B)])
        return cls(
            tails={part: kurtosis(scores[part]) for part in PARTS},
            supports=supports,
            held={part: _share(changes[part], supports[part]) for part in PARTS},
            product=product,
            rank=truncate(product, energy=ENERGY).pair.rank,
            condition=torch.linalg.cond(after.B.double()).item(),
        )


def _share(change: Tensor, positions: Tensor) -> float:
    squares = change.double().square().flatten()
    return (squares[positions].sum() / squares.sum().clamp_min(1e-300)).item()


def overlap(first: Tensor, second: Tensor) -> float:
    """The share of the positions of the smaller of two supports that the other has too; 0 where one is empty."""
    shared = np.intersect1d(first.numpy(), second.numpy(), assume_unique=True).size
    return shared / max(min(first.numel(), second.numel()), 1)


def cosine(first: LoraPair, second: LoraPair) -> float:
    """Of the angle between two products; 0 where one is zero."""
    size = frobenius_norm(first) * frobenius_norm(second)
    return inner_product(first, second) / size if size else 0.0


@dataclass(eq=False, slots=True)
class Looks:
    """The looks of the round under way and of each client's last turn before it, and a row for every round before."""

    density: float
    ranks: Mapping[str, int]
    rows: list[Row] = field(default_factory=list)
    round: int = 0
    now: dict[str, dict[str, Look]] = field(default_factory=dict)
    last: dict[str, dict[str, Look]] = field(default_factory=dict)

    def add(self, round: int, client: str, before: LoraState, after: LoraState) -> None:
        """A client's change, in the components that all clients have."""
        if round != self.round:
            self.close()
            self.round = round
        old, new = (narrow(state, {m: self.ranks[m] for m in state}) for state in (before, after))
        self.now[client] = {module: Look.at(old[module], new[module], self.density) for module in new}

    def close(self) -> None:
        """The round is over."""
        if self.now:
            between = [pair for a, b in combinations(self.now.values(), 2) for pair in _shared(a, b)]
            both = sorted(self.now.keys() & self.last.keys())
            since = [pair for client in both for pair in _shared(self.last[client], self.now[client])]
            looks = [look for one in self.now.values() for look in one.values()]
            self.rows.append(_row(self.round, looks, between, since))
        self.last |= self.now
        self.now = {}


def _shared(first: Mapping[str, Look], second: Mapping[str, Look]) -> list[tuple[Look, Look]]:
    return [(first[module], second[module]) for module in first if module in second]


@dataclass(frozen=True, slots=True)
class Row:
    """One round: means over clients and modules, and over pairs of clients; None where there is no pair.

    By factor: kurtosis, the median, of importance; held, what the most important elements have of the squared norm;
    clients, the overlap of two clients' supports; rounds, that of a client's support with that of its last turn.
    cosine: between two clients' changes of B A. rank: components of such a change that hold `ENERGY`. condition: the
    median, of B.
    """

    round: int
    kurtosis: Mapping[str, float]
    held: Mapping[str, float]
    clients: Mapping[str, float | None]
    rounds: Mapping[str, float | None]
    cosine: float | None
    rank: float
    condition: float


Pairs = Sequence[tuple[Look, Look]]


def _row(round: int, looks: Sequence[Look], between: Pairs, since: Pairs) -> Row:
    return Row(
        round=round,
        kurtosis={part: median(look.tails[part] for look in looks) for part in PARTS},
        held={part: fmean(look.held[part] for look in looks) for part in PARTS},
        clients={part: _mean([overlap(a.supports[part], b.supports[part]) for a, b in between]) for part in PARTS},
        rounds={part: _mean([overlap(a.supports[part], b.supports[part]) for a, b in since]) for part in PARTS},
        cosine=_mean([cosine(a.product, b.product) for a, b in between]),
        rank=fmean(look.rank for look in looks),
        condition=median(look.condition for look in looks),
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def run(config: Config, *, density: float = 0.01) -> dict[str, Any]:
    """{"density": …, "rows": [Row as a dict, …]}, a row for each round. Raises what running `config` raises."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        RunFolder.open(Path(scratch) / "run", config, resume=False) as folder,
    ):
        setup = load_setup(config)
        sites = setup.sites.values()
        ranks = {m: min(site.ranks[m] for site in sites if m in site.ranks) for m in setup.initial}
        looks = Looks(density, ranks)

        def look(round: int, client: str, before: State, turn: ClientTurn) -> None:
            looks.add(round, client, before.adapter, turn.trained.adapter)

        Rounds(setup, folder, Silent(), LocalSites(setup, look)).play(resume=False)
        looks.close()
    return {"density": density, "rows": [asdict(row) for row in looks.rows]}


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The rows for a terminal, A / B where there are two numbers."""
    title = (
        f"changes as trained, A / B: what their top {result['density']:.1%} hold, and share between clients and rounds"
    )
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    columns = ("kurtosis", "of ‖Δ‖²", "clients", "rounds", "cosine", f"rank {ENERGY:.0%}", "cond(B)")
    for name in ("round", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        kinds = [" / ".join(f"{row['kurtosis'][part]:.1f}" for part in PARTS)]
        kinds += [" / ".join(_number(row[key][part]) for part in PARTS) for key in ("held", "clients", "rounds")]
        table.add_row(str(row["round"]), *kinds, *(_number(row[key]) for key in ("cosine", "rank", "condition")))
    yield table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
