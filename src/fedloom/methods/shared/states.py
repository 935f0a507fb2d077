"""Broadcasts that say the whole adapter in few bits: its difference from the one that the run began with.

The server holds the mean exactly, and broadcasts it rounded anew in every round; what rounding leaves out is not lost.
Server and clients go on from the rounded one. So a client needs the newest broadcast alone, however many it missed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial

from torch import Tensor

from fedloom.compress.entries import to_dense
from fedloom.compress.levels import Coded, Part, Size
from fedloom.errors import ConfigError
from fedloom.lora.pair import PARTS, LoraState, from_tensors
from fedloom.methods.method import Aggregate, Context, Entries, Facts, Method, State, Update, both_factors
from fedloom.methods.shared.averaging import Parts, weighted_mean, zero_change
from fedloom.methods.shared.dial import BUDGET, Dial, spend_run
from fedloom.methods.shared.guard import UNDONE, Verdict, before_step, judge_step, remember_before, store
from fedloom.methods.shared.whole import adopt_whole, read_whole_change, whole_adapter

Room = Callable[[LoraState, str, Context], int]
"""(adapter, "up" or "down", context) → bytes that a payload may take."""

Code = Callable[[Mapping[str, Part], int, Size], Coded]
"""(parts, bytes, size of a payload) → the parts in codes: `levels.code_within` or `paths.trace_within`."""

LOST = "coded_error"
"""Among a round's numbers: the share of Σ (w x)² that rounding left out."""


def loom_of_states(dial: Dial, code: Code, rate: float, guard: bool, trained: Parts = both_factors) -> Method:
    """loom whose broadcasts say the whole adapter; with fewer `trained` parts it needs another `aggregate`."""
    return Method(
        name="loom",
        facts=Facts(
            paper="fedloom (docs/loom.md)",
            unequal_ranks=True,
            sends="ΔA and ΔB in few bits",
            receives="A and B in few bits",
            keeps="server: what rounding left out, its last adapter",
            broadcasts="elements",
        ),
        updates="change",
        compress=partial(send_change, code, dial.bytes, trained),
        aggregate=partial(broadcast_state, code, dial.bytes, rate, guard),
        receive=take_state,
        trainable=trained,
        needs_start=True,
        adopt=adopt_whole,
        adds=read_whole_change,
        replaces=PARTS,
        joins=True,
        own_values=True,
        smallest=dial.smallest,
        takes_budget=True,
        default_budget=BUDGET,
        spend=spend_run,
        values="int4",
    )


def send_change(
    code: Code, room: Room, trained: Parts, state: State, after: LoraState, context: Context
) -> tuple[Mapping[str, Tensor], Entries]:
    """ΔA and ΔB, as far as they are trained, in codes that keep their length, weighed by what they change in ΔW."""
    parts = weigh_change(state.adapter, after, trained(context.round), whole=True)
    return state.memory, code(parts, room(state.adapter, "up", context), context.size).entries


def weigh_change(
    before: LoraState, after: LoraState, trained: Collection[str] = PARTS, *, whole: bool = False
) -> dict[str, Part]:
    """ΔA and ΔB of every module of `after`, each element weighed by the norm of what it is multiplied with.

    trained: "A", "B" or both: no other part has changed.
    """
    parts: dict[str, Part] = {}
    for module, now in after.items():
        was = before[module]
        weights = {"A": now.B.norm(dim=0)[:, None], "B": was.A.norm(dim=1)[None]}
        for part in trained:
            parts[f"{module}/{part}"] = Part(now.part(part) - was.part(part), weights[part], whole)
    return parts


def broadcast_state(
    code: Code, room: Room, rate: float, guard: bool, state: State, updates: Iterable[Update], context: Context
) -> Aggregate:
    """The adapter after `rate` times the clients' mean, as far as the budget goes; `guard`: see `shared.guard`."""
    start, memory = _start(context), state.memory
    ages: list[int] = []
    means = weighted_mean(_note_ages(updates, ages), start=zero_change(state.adapter))
    seen = means
    if guard and any(ages):  # an update that was begun before the last step says nothing of it
        seen = weighted_mean((one for one in updates if not one.staleness), start=zero_change(state.adapter))
    now = {name: t + memory[name] if name in memory else t for name, t in state.adapter.tensors().items()}
    verdict = judge_step(state, now, seen) if guard else Verdict(1.0, dict.fromkeys(state.adapter, 1.0))
    exact = before_step(state) if verdict.wrong else _step(now, means, rate, verdict)
    parts: dict[str, Part] = {}
    for module, pair in from_tensors(exact).items():
        a, b = pair.A - start[module].A, pair.B - start[module].B
        parts[f"{module}/A"] = Part(a, pair.B.norm(dim=0)[:, None])
        parts[f"{module}/B"] = Part(b, pair.A.norm(dim=1)[None])
    coded = code(parts, room(state.adapter, "down", context), context.size)
    kept: dict[str, Tensor] = store(verdict) if guard else {}
    if guard and not verdict.wrong:  # a step is judged once, and one that is taken back not at all
        kept |= remember_before(now)
    kept |= {name: parts[name].values - to_dense(entry) for name, entry in coded.entries.items()}
    stats = {LOST: lost_share(parts, coded.entries), **(verdict.stats if guard else {})}
    return Aggregate(coded.entries, kept, {**stats, UNDONE: 1.0} if verdict.wrong else stats)


def lost_share(parts: Mapping[str, Part], entries: Entries) -> float:
    """The share of Σ (w x)² that entries of these parts leave out; 0 where there is nothing."""
    lost = whole = 0.0
    for name, entry in entries.items():
        part = parts[name]
        lost += float(((part.values - to_dense(entry)) * part.weights).square().sum())
        whole += float((part.values * part.weights).square().sum())
    return lost / whole if whole else 0.0


def _note_ages(updates: Iterable[Update], ages: list[int]) -> Iterator[Update]:
    """The same updates; how stale each is goes to `ages`."""
    for update in updates:
        ages.append(update.staleness)
        yield update


def _step(now: Mapping[str, Tensor], means: Mapping[str, Tensor], rate: float, verdict: Verdict) -> dict[str, Tensor]:
    """One step on, as long as the verdict allows."""
    return {name: t.add(means[name], alpha=rate * verdict.gains[name.rpartition("/")[0]]) for name, t in now.items()}


def take_state(state: State, entries: Entries, context: Context) -> State:
    """The adapter that a broadcast says; a tensor that was not sent stays."""
    start = _start(context)
    received = {name: _origin(start, name) + to_dense(entry) for name, entry in entries.items()}
    return adopt_whole(state, from_tensors(whole_adapter(state).tensors() | received), state.frozen)


def _origin(start: LoraState, name: str) -> Tensor:
    module, _, part = name.rpartition("/")
    return start[module].part(part)


def _start(context: Context) -> LoraState:
    """The adapter that the run began with. Raises ConfigError where the job does not know it."""
    if not context.start:
        raise ConfigError("method.broadcast = 'state' needs the adapter that the run begins with: Job(start=…)")
    return context.start
