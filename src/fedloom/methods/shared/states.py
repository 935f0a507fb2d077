"""Broadcasts that say the whole adapter in few bits: its difference from the one that the run began with.

The server holds the mean exactly, and broadcasts it rounded anew in every round; what rounding leaves out is not lost.
Server and clients go on from the rounded one. So a client needs the newest broadcast alone, however many it missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from fedloom.compress.entries import to_dense
from fedloom.compress.levels import Part, code_within
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState, from_tensors
from fedloom.methods.method import Aggregate, Context, Entries, State, Update
from fedloom.methods.shared.averaging import weighted_mean, zero_change
from fedloom.methods.shared.guard import UNDONE, Verdict, before_step, judge_step, remember_before, store
from fedloom.methods.shared.whole import adopt_whole, whole_adapter

Room = Callable[[LoraState, str, Context], int]
"""(adapter, "up" or "down", context) → bytes that a payload may take."""

LOST = "coded_error"
"""Among a round's numbers: the share of Σ (w x)² that rounding left out."""


def send_levels(room: Room, state: State, after: LoraState, context: Context) -> tuple[Mapping[str, Tensor], Entries]:
    """ΔA and ΔB in codes that keep their length, weighed by what they change in ΔW."""
    parts: dict[str, Part] = {}
    for module, now in after.items():
        was = state.adapter[module]
        parts[f"{module}/A"] = Part(now.A - was.A, now.B.norm(dim=0)[:, None], whole=True)
        parts[f"{module}/B"] = Part(now.B - was.B, was.A.norm(dim=1)[None], whole=True)
    coded = code_within(parts, room(state.adapter, "up", context), context.size)
    return state.memory, coded.entries


def broadcast_state(room: Room, guard: bool, state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """The mean adapter, as far as the budget goes; with `guard` its step is judged by `shared.guard`."""
    start, memory = _start(context), state.memory
    ages: list[int] = []
    means = weighted_mean(_note_ages(updates, ages), start=zero_change(state.adapter))
    seen = means
    if guard and any(ages):  # an update that was begun before the last step says nothing of it
        seen = weighted_mean((one for one in updates if not one.staleness), start=zero_change(state.adapter))
    now = {name: t + memory[name] if name in memory else t for name, t in state.adapter.tensors().items()}
    verdict = judge_step(state, now, seen) if guard else Verdict(1.0, dict.fromkeys(state.adapter, 1.0))
    exact = before_step(state) if verdict.wrong else _step(now, means, verdict)
    parts: dict[str, Part] = {}
    for module, pair in from_tensors(exact).items():
        a, b = pair.A - start[module].A, pair.B - start[module].B
        parts[f"{module}/A"] = Part(a, pair.B.norm(dim=0)[:, None])
        parts[f"{module}/B"] = Part(b, pair.A.norm(dim=1)[None])
    coded = code_within(parts, room(state.adapter, "down", context), context.size)
    kept: dict[str, Tensor] = store(verdict) if guard else {}
    if guard and not verdict.wrong:  # a step is judged once, and one that is taken back not at all
        kept |= remember_before(now)
    lost = whole = 0.0
    for name, entry in coded.entries.items():
        part = parts[name]
        kept[name] = part.values - to_dense(entry)
        lost += float((kept[name] * part.weights).square().sum())
        whole += float((part.values * part.weights).square().sum())
    stats = {LOST: lost / whole if whole else 0.0, **(verdict.stats if guard else {})}
    return Aggregate(coded.entries, kept, {**stats, UNDONE: 1.0} if verdict.wrong else stats)


def _note_ages(updates: Iterable[Update], ages: list[int]) -> Iterator[Update]:
    """The same updates; how stale each is goes to `ages`."""
    for update in updates:
        ages.append(update.staleness)
        yield update


def _step(now: Mapping[str, Tensor], means: Mapping[str, Tensor], verdict: Verdict) -> dict[str, Tensor]:
    """One step on, as long as the verdict allows."""
    return {name: t.add(means[name], alpha=verdict.gains[name.rpartition("/")[0]]) for name, t in now.items()}


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
