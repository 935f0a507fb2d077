"""`python -m benchmarks distortion`: how far loom's codes are from the rate–distortion bound of real updates.

A run is played as its settings say. Every client's update is coded anew at several budgets, as signs and as integer
codes, and what is lost of it is set beside the least bits that any code of independent values would need for that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from fedloom.compress.budget import Budget
from fedloom.compress.entries import to_dense
from fedloom.compress.levels import Part, code_within
from fedloom.compress.paths import trace_within
from fedloom.compress.quantize import quantize
from fedloom.lora.pair import LoraState
from fedloom.methods.loom import loom
from fedloom.methods.method import Context, Entries, State
from fedloom.methods.shared.states import weigh_change
from fedloom.records.config import Config
from fedloom.records.events import Silent
from fedloom.rounds.draft import Draft
from fedloom.rounds.joint import Outline
from fedloom.rounds.turns import ClientTurn
from fedloom.server.local import LocalSites
from fedloom.server.loop import Rounds
from fedloom.wire import Header, describe
from fedloom.workspace.assemble import load_setup
from fedloom.workspace.folder import RunFolder

Floats = NDArray[np.float64]

FORMS = ("signs", "codes", "paths")
"""The most important elements as loom sends them in changes; integer codes; paths through a trellis."""

BITS = (0.1, 0.3, 1.0, 2.0)
"""Bits of a payload for a value of the adapter."""

_WIDE, _POINTS = 6.0, 241  # a normalised value lies within ± 6, on a grid finer than any error that is looked at
_SLOPES = np.logspace(-0.5, 2.2, 40)
_ROUNDS = 200  # of Blahut's algorithm; another hundred change nothing in the fourth digit
_LEAST = 1e-300
_HEADER = Header("update", "loom", 1, 0, "ab" * 16, "cd" * 16, 1)


@dataclass(frozen=True, eq=False, slots=True)
class Bound:
    """Rate and distortion of independent values: of one scale each group, all of one law else.

    bits: of a value, on the mean. lost: share of the squared norm.
    """

    bits: Floats
    lost: Floats

    @classmethod
    def of(cls, values: Sequence[Floats]) -> Bound:
        """The bound for groups of values, to whoever knows every group's variance and the common law beforehand.

        What one error is worth is the same in all groups (reverse water-filling); within a group Blahut's algorithm
        (1972) finds what the law allows.
        """
        groups = [group for group in values if np.any(group)]
        counts = np.array([group.size for group in groups], float)
        variances = np.array([np.mean(group**2) for group in groups])
        law = np.concatenate([g / v**0.5 for g, v in zip(groups, variances, strict=True)])
        rates, losses = unit_curve(law)
        whole = sum(group.size for group in values)  # groups of zeros cost nothing
        bits, lost = [], []
        for slope in np.logspace(-4, 4, 400) / variances.mean():
            at = slope * variances
            bits.append(counts @ np.interp(at, _SLOPES, rates, left=0.0) / whole)
            lost.append(counts @ (variances * np.interp(at, _SLOPES, losses, left=1.0)) / (counts @ variances))
        return cls(np.array(bits), np.array(lost))

    def at(self, lost: float) -> float:
        """Bits of a value, below which no code of such values loses so little."""
        return float(np.interp(-lost, -self.lost, self.bits))


def unit_curve(law: Floats) -> tuple[Floats, Floats]:
    """(bits, squared error) for values of variance 1, at each of the slopes −dD/dR that are looked at."""
    grid = np.linspace(-_WIDE, _WIDE, _POINTS)
    cells = np.rint((law.clip(-_WIDE, _WIDE) + _WIDE) * (_POINTS - 1) / (2 * _WIDE)).astype(int)
    source = np.bincount(cells, minlength=_POINTS) / cells.size
    errors = (grid[:, None] - grid[None]) ** 2
    rates, losses = [], []
    for slope in _SLOPES:
        near = np.exp(-slope * errors)
        drawn = np.full(_POINTS, 1 / _POINTS)
        for _ in range(_ROUNDS):
            drawn = drawn * (source / (near @ drawn + _LEAST) @ near)
        among = near * drawn / (near @ drawn + _LEAST)[:, None]
        told = np.log2(among / (drawn + _LEAST), out=np.zeros_like(among), where=among > _LEAST)
        rates.append(source @ (among * told).sum(axis=1))
        losses.append(source @ (among * errors).sum(axis=1))
    return np.array(rates), np.array(losses)


@dataclass(frozen=True, eq=False, slots=True)
class Coded:
    """One update in one form: bits of a value that the payload takes, of which names, shapes and header; what is lost.

    lost: 1 − cos² of the angle between the update and what is sent, where an error e at a place of weight w counts
    (w e)²; so a form that stretches what it sends is not judged by its length. bound: bits that the bound asks for.
    """

    form: str
    asked: float
    bits: float
    overhead: float
    lost: float
    bound: float


@dataclass(eq=False)
class Codings:
    """An update, and what becomes of it."""

    before: LoraState
    after: LoraState
    parts: Mapping[str, Part] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = weigh_change(self.before, self.after)

    @cached_property
    def bound(self) -> Bound:
        """Its bound, a group a component of a tensor."""
        groups: list[Floats] = []
        for name, part in self.parts.items():
            weighed = (part.values * part.weights).double().numpy()
            groups += list(weighed if name.endswith("/A") else weighed.T)
        return Bound.of(groups)

    def code(self, form: str, asked: float) -> Coded:
        """In a form ("signs", "codes" or "paths") with so many bits a value at most."""
        budget = int(asked * self.before.numel() / 8)
        draft = Draft(_HEADER, Outline.of(self.after, self.before.ranks(), _HEADER.base_digest))
        if form != "signs":
            code = trace_within if form == "paths" else code_within
            entries: Entries = code(self.parts, budget, draft.size).entries
        else:
            context = Context(1, 0, quantize("sign"), Budget(size=budget), size=draft.size)
            entries = loom(upload_share=0.5).compress(State(self.before), self.after, context)[1]
        told = describe(draft.payload(entries))
        per = 8 / self.before.numel()
        outside = sum(told.parts[name] for name in ("header", "index", "checksum"))
        lost = self.lost(entries)
        return Coded(form, asked, per * told.size, per * outside, lost, self.bound.at(lost))

    def lost(self, entries: Entries) -> float:
        """1 − cos² between the update and its entries, by weight."""
        product = own = whole = 0.0
        for name, part in self.parts.items():
            was = (part.values * part.weights).double()
            whole += float(was.square().sum())
            if name in entries:
                sent = (to_dense(entries[name]) * part.weights).double()
                product, own = product + float((was * sent).sum()), own + float(sent.square().sum())
        return 1.0 - product**2 / (own * whole) if own and whole else 1.0


def run(config: Config, *, bits: Sequence[float] = BITS) -> dict[str, Any]:
    """{"updates": how many, "values": of each, "rows": [Coded as a dict, the mean over all updates, …]}."""
    seen: list[Coded] = []
    sizes: list[int] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        RunFolder.open(Path(scratch) / "run", config, resume=False) as folder,
    ):
        setup = load_setup(config)

        def look(round: int, client: str, before: State, turn: ClientTurn) -> None:
            update = Codings(before.adapter, turn.trained.adapter)
            sizes.append(before.adapter.numel())
            seen.extend(update.code(form, asked) for asked in bits for form in FORMS)

        Rounds(setup, folder, Silent(), LocalSites(setup, look)).play(resume=False)
    rows = []
    for asked in bits:
        for form in FORMS:
            same = [asdict(one) for one in seen if (one.form, one.asked) == (form, asked)]
            means = {key: fmean(one[key] for one in same) for key in ("bits", "overhead", "lost", "bound")}
            rows.append({"form": form, "asked": asked, **means})
    return {"updates": len(sizes), "values": max(sizes), "rows": rows}


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The rows for a terminal."""
    title = (
        f"{result['updates']} updates of {result['values']:,} values: bits of a value, and what is lost of the update"
    )
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("form", "at most", "bits", "names, header", "lost", "bound: bits", "× bound"):
        table.add_column(name, justify="left" if name == "form" else "right", no_wrap=True)
    for row in result["rows"]:
        times = f"{row['bits'] / row['bound']:.2f}" if row["bound"] else "–"
        numbers = (row["bits"], row["overhead"], row["lost"], row["bound"])
        table.add_row(row["form"], f"{row['asked']:g}", *(f"{number:.3f}" for number in numbers), times)
    yield table
