"""FedSRD and FedSRD-e: sparsify, reconstruct, decompose (Yan et al., WWW 2026, arXiv 2510.04601).

Clients send the important elements of ΔA and ΔB. The server rebuilds Σ p_k B_k A_k, takes its best rank-r
approximation (FedSRD) or leaves it as it is (FedSRD-e), and expresses the change in one factor alone, B and A
in turn. It begins with B: at the start B = 0, and a change of A would change nothing.

The aggregate is one of products, so ranks may differ: a client of rank q sends changes of the first q components, and
its B_k A_k has the server's other components as they are (`shared.whole`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fedloom.compress.entries import Entry
from fedloom.compress.seeds import derived_seed
from fedloom.compress.sparsify import (
    Adaptive,
    Choice,
    Rescale,
    Rescaling,
    choose,
    counts_by_importance,
    importance,
    kept_count,
    scratch,
)
from fedloom.errors import ConfigError
from fedloom.lora.lowrank import ProductChange, map_modules
from fedloom.lora.pair import PARTS, LoraPair, LoraState
from fedloom.methods.fed_dare import drop_and_rescale
from fedloom.methods.method import Aggregate, Context, Entries, Facts, Method, State, Update
from fedloom.methods.shared.averaging import alternating_factors, fill_within_budget
from fedloom.methods.shared.guard import Witness
from fedloom.methods.shared.whole import add_to_whole, adopt_whole, widen_change

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Upload:
    """How a client thins its change out."""

    sparsity: Adaptive
    rescaling: Rescaling
    decay: float


@dataclass(frozen=True, slots=True)
class Download:
    """How the server thins the broadcast out."""

    pick: Literal["random", "topk"]
    density: float
    rescaling: Rescaling
    decay: float


@dataclass(frozen=True, slots=True)
class Solver:
    """How the aggregate becomes a change of one factor."""

    decompose: bool
    ridge: float
    rcond: float


def fedsrd(
    *,
    decompose: bool = True,
    base_sparsity: float = 0.85,
    kurtosis_slope: float = 0.1,
    sparsity_upper: float = 0.11,
    rescale: Rescale = "l1",
    rescale_cap: float = math.inf,
    rescale_step: float = 5.0,
    client_residual: float = 0.0,
    download: Literal["random", "topk"] = "topk",
    download_sparsity: float = 0.8,
    download_rescale: Rescale = "none",
    server_residual: float = 0.0,
    ridge: float = 0.03,
    rcond: float = 1e-6,
    step_guard: bool = True,
) -> Method:
    """FedSRD (decompose: best rank-r approximation of the aggregate) or FedSRD-e (the aggregate itself, no SVD).

    base_sparsity, kurtosis_slope, sparsity_upper: share of each client matrix left out (see `Adaptive`).
    rescale: "l1" gives what is sent the L1 norm of the whole, by a factor of at most rescale_cap, and at most
    rescale_step times its L2 norm: few elements that go as far as all of them overshoot (docs/LOG.md).
    client_residual, server_residual: 0 drops what was not sent; 0 < d ≤ 1 adds d times it to the next change.
    download: "random" keeps a seeded share 1 − download_sparsity, divided by it (DARE); "topk" the most important
    elements, rescaled by download_rescale. ridge, rcond: see `lowrank.ProductChange`. step_guard: shorten the server's
    steps, or take one back, where the clients undo the last one (`shared.guard`). Preset "paper" has the paper's random
    download, no ridge and no guard; docs/LOG.md says why the default differs.
    """
    _check_shares(client_residual=client_residual, server_residual=server_residual, download_sparsity=download_sparsity)
    if ridge < 0 or rcond < 0:
        raise ConfigError(f"method: ridge {ridge} and rcond {rcond} must be ≥ 0")
    if rescale_cap < 1 or rescale_step < 1:
        raise ConfigError(f"method: rescale_cap {rescale_cap} and rescale_step {rescale_step} must be ≥ 1")
    up, down = (Rescaling(kind, rescale_cap, rescale_step) for kind in (rescale, download_rescale))
    sparsity = Adaptive(base_sparsity, kurtosis_slope, sparsity_upper)
    thinned = Download(download, 1.0 - download_sparsity, down, server_residual)
    return Method(
        name="fedsrd" if decompose else "fedsrd-e",
        facts=Facts(
            paper="FedSRD (arXiv 2510.04601)" if decompose else "FedSRD-e (arXiv 2510.04601)",
            unequal_ranks=True,
            sends="important elements of ΔA and ΔB",
            receives="one sparse factor, B and A in turn",
            keeps="server: its last step; residuals, where asked for",
            broadcasts="change",
            one_factor=True,
        ),
        updates="change",
        compress=partial(send_important, Upload(sparsity, up, client_residual)),
        aggregate=partial(reconstruct, Solver(decompose, ridge, rcond), thinned, step_guard),
        receive=add_to_whole,
        adopt=adopt_whole,
        takes_budget=True,
        values="int4",
        wider={0.12: "int8"},  # four bits a value are an eighth of dense fp32: above that, wider values use the budget
    )


def _check_shares(**shares: float) -> None:
    for key, share in shares.items():
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"method.{key} is {share}: expected 0 to 1")


@dataclass(frozen=True, eq=False, slots=True)
class Changes:
    """What training changed in every factor, looked at one by one: all of it is never in memory."""

    up: Upload
    state: State
    after: LoraState
    context: Context

    def of(self, module: str, part: str) -> tuple[Tensor, Tensor]:
        """A factor's change and its importances, in memory that this thread's next change overwrites."""
        now, before = self.after[module], self.state.adapter[module]
        moved = torch.sub(now.part(part), before.part(part), out=scratch.like("change", now.part(part)))
        delta = carry_residual(moved, self.state.memory.get(f"{module}/{part}"), self.up.decay)
        other = now.B if part == "A" else before.A
        return delta, importance(delta, other, part, out=scratch.like("scores", delta))

    def each(self, look: Callable[[str, Tensor, Tensor], T]) -> dict[str, T]:
        """Tensor → look(tensor, change, importances)."""
        pieces = map_modules(
            lambda module: {f"{module}/{part}": look(f"{module}/{part}", *self.of(module, part)) for part in PARTS},
            self.state.adapter,
        )
        return {tensor: found for piece in pieces for tensor, found in piece.items()}

    def cut(self, count: Callable[[str, Tensor], int]) -> dict[str, Choice]:
        """Of every change as many elements as count(tensor, importances) says."""

        def choose_of(tensor: str, delta: Tensor, scores: Tensor) -> Choice:
            seed = derived_seed(self.context.seed, "upload", self.context.round, tensor)
            keep, up = count(tensor, scores), self.up
            quantize = self.context.quantize
            return choose(delta, scores, keep, rescaling=up.rescaling, quantize=quantize, seed=seed)

        return self.each(choose_of)


def send_important(
    up: Upload, state: State, after: LoraState, context: Context
) -> tuple[Mapping[str, Tensor], Entries]:
    """The most important elements of ΔA and ΔB of every module (FedSRD eq. 4–7), or as many as the budget allows."""
    changes = Changes(up, state, after, context)
    kept: Mapping[str, Tensor] = {}
    if context.budget is None:
        made = changes.cut(lambda tensor, scores: up.sparsity.keep(scores))
    else:
        made, kept = fill_with_important(changes)
    rest = changes.each(lambda tensor, delta, scores: made[tensor].rest(delta)) if up.decay else {}
    return {**kept, **rest}, {tensor: choice.sent for tensor, choice in made.items()}


def fill_with_important(changes: Changes) -> tuple[dict[str, Choice], Mapping[str, Tensor]]:
    """(what is sent, what to remember for the next time) within the budget: the most important elements of all."""
    state = changes.state
    counts = counts_by_importance(lambda function: changes.each(lambda tensor, delta, scores: function(scores)))
    tried: dict[float, dict[str, Choice]] = {}

    # While B = 0 a change of A alone changes nothing, however important it looks after training.
    still = {f"{module}/B": 1 for module, pair in state.adapter.items() if not pair.B.any()}

    def entries_at(density: float) -> dict[str, Entry]:
        found = counts(density)
        tried[density] = changes.cut(lambda tensor, scores: max(found[tensor], still.get(tensor, 0)))
        return {tensor: choice.sent for tensor, choice in tried[density].items()}

    done = fill_within_budget(state, 2 * len(state.adapter), entries_at, changes.context)
    return tried[done.density], done.memory


def carry_residual(delta: Tensor, residual: Tensor | None, decay: float) -> Tensor:
    """The change plus what earlier rounds kept back."""
    return delta if residual is None or not decay else delta + decay * residual


def reconstruct(
    solver: Solver, down: Download, guard: bool, state: State, updates: Iterable[Update], context: Context
) -> Aggregate:
    """Σ p_k B_k A_k − B A expressed in one factor (FedSRD eq. 8–12), thinned out for the way down."""
    part: Literal["A", "B"] = "B" if "B" in alternating_factors(context.round) else "A"
    changes = {
        module: ProductChange(
            pair, part, rank=pair.rank if solver.decompose else None, ridge=solver.ridge, rcond=solver.rcond
        )
        for module, pair in state.adapter.items()
    }
    witness = Witness(state, guard)
    for update in witness.watch(updates):
        add = partial(add_to, changes, state.adapter.ranks(), update)
        map_modules(add, changes, [change.cost for change in changes.values()])
    verdict = witness.judge()
    if verdict.wrong:
        return witness.take_back(verdict, context)

    def finish(module: str) -> tuple[str, Entry, Tensor | None, int]:
        """The entry of one module's factor, what it leaves out, and the directions kept; its changes are let go of."""
        solved, gain, name = changes.pop(module).solve(), verdict.gains[module], f"{module}/{part}"
        # Turned once into the order of its elements, not again by every step that looks at them one after the other.
        step = torch.mul(_in_order(solved.delta), gain, out=scratch.like("change", solved.delta))
        delta = carry_residual(step, state.memory.get(name), down.decay)
        return name, *thin_change(down, delta, state.adapter[module], name, context), solved.kept

    costs = [change.cost for change in changes.values()]  # before the first one is let go of
    done = map_modules(finish, list(changes), costs)
    entries = {name: entry for name, entry, _, _ in done}
    rest = {name: left for name, _, left, _ in done if left is not None}
    kept = sum(number for _, _, _, number in done) / max(len(done), 1)
    stats = {"mean_directions_kept": kept, **(verdict.stats if guard else {})}
    return Aggregate(entries, {**state.memory, **rest, **witness.remember(verdict, entries)}, stats)


def _in_order(tensor: Tensor) -> Tensor:
    """A tensor whose elements lie in row-major order, in memory that this thread's next change overwrites."""
    held = scratch.like("change", tensor)
    return tensor.contiguous() if tensor.is_contiguous() or held is None else held.copy_(tensor)


def add_to(changes: Mapping[str, ProductChange], ranks: Mapping[str, int], update: Update, module: str) -> None:
    """Add one client's change of one module. Its model has the whole pair, of which it may train a part only."""
    delta = {part: widen_change(update.entries[f"{module}/{part}"], part, ranks[module]) for part in PARTS}
    changes[module].add(delta["B"], delta["A"], update.weight)


def thin_change(
    down: Download, delta: Tensor, pair: LoraPair, name: str, context: Context
) -> tuple[Entry, Tensor | None]:
    """(entry to broadcast, what it leaves out) of one factor's change; None where nothing is kept back."""
    seed = derived_seed(context.seed, "download", context.round, name)
    if down.pick == "random":
        entry, rest = drop_and_rescale(delta, down.density, seed, context)
        return entry, rest if down.decay else None
    part = name[-1]
    scores = importance(delta, pair.B if part == "A" else pair.A, part, out=scratch.like("scores", delta))
    keep = kept_count(delta.numel(), down.density)
    cut = choose(delta, scores, keep, rescaling=down.rescaling, quantize=context.quantize, seed=seed)
    return cut.sent, cut.rest(delta) if down.decay else None
