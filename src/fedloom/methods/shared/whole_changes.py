"""Broadcasts that say what changes, every element of it: what rounding loses waits for the next one.

Where `loom` sends the most important elements alone, this sends all of them in a fraction of a bit each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedloom.compress.entries import to_dense
from fedloom.compress.levels import Part
from fedloom.compress.paths import trace_within
from fedloom.methods.method import Aggregate, Context, Method, State, Update, both_factors
from fedloom.methods.shared.averaging import Parts, weighted_mean, zero_change
from fedloom.methods.shared.dial import Dial
from fedloom.methods.shared.guard import UNDONE, Witness
from fedloom.methods.shared.states import LOST, Room, loom_of_states, lost_share
from fedloom.methods.shared.whole import add_to_whole


def loom_of_paths(dial: Dial, residual: float, rate: float, guard: bool, trained: Parts = both_factors) -> Method:
    """loom whose broadcasts say what changes, all of it in a fraction of a bit a value.

    trained: round → the factors that are trained and sent in it.
    """
    made = loom_of_states(dial, trace_within, rate, guard, trained)
    what = " and ".join(f"Δ{part}" for part in trained(1))
    return replace(
        made,
        facts=replace(
            made.facts,
            sends=f"{what} in few bits",
            receives=f"{what} in few bits",
            keeps="server: what rounding left out, its last step",
        ),
        aggregate=partial(broadcast_change, dial.bytes, residual, rate, guard, trained),
        receive=add_to_whole,
        needs_start=False,
        replaces=(),
    )


def broadcast_change(
    room: Room,
    residual: float,
    rate: float,
    guard: bool,
    trained: Parts,
    state: State,
    updates: Iterable[Update],
    context: Context,
) -> Aggregate:
    """`rate` times the clients' mean and what earlier broadcasts lost, as far as the budget goes, times the gain.

    residual: what a broadcast lost is multiplied by this. With `guard` the step is judged by `shared.guard`.
    """
    witness = Witness(state, guard)
    means = weighted_mean(witness.watch(updates), start=zero_change(state.adapter, trained(context.round)))
    verdict = witness.judge()
    waiting = {name: state.memory[name] for name in means if name in state.memory}
    gains: Mapping[str, float] = verdict.gains
    if verdict.wrong:  # what waits goes on waiting
        sums, gains = _turn_back(witness, means), dict.fromkeys(state.adapter, 1.0)
    else:
        sums = {name: rate * mean for name, mean in means.items()}
        for name, left in waiting.items():
            sums[name].add_(left, alpha=residual)
        waiting = {}
    parts: dict[str, Part] = {}
    for module, pair in state.adapter.items():
        steps = {part: gains[module] * sums[f"{module}/{part}"] for part in trained(context.round)}
        weights = {"A": (pair.B + steps.get("B", 0.0)).norm(dim=0)[:, None], "B": pair.A.norm(dim=1)[None]}
        parts |= {f"{module}/{part}": Part(step, weights[part]) for part, step in steps.items()}
    entries = trace_within(parts, room(state.adapter, "down", context), context.size).entries
    # What waits is kept without the gain, so that the next round's gain holds for all of it.
    rest = {
        name: (parts[name].values - to_dense(entry)) / gains[name.rpartition("/")[0]] + waiting.get(name, 0.0)
        for name, entry in entries.items()
    }
    kept = witness.forget(verdict) if verdict.wrong else witness.remember(verdict, entries)
    stats = {LOST: lost_share(parts, entries), **(verdict.stats if guard else {})}
    memory = {**state.memory, **(rest if residual else {}), **kept}
    return Aggregate(entries, memory, {**stats, UNDONE: 1.0} if verdict.wrong else stats)


def _turn_back(witness: Witness, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last step with its sign turned. It is coded as any other, since its elements would not fit the budget."""
    back = {name: torch.zeros_like(mean) for name, mean in means.items()}
    for name, step in witness.steps.items():
        back[name].view(-1)[step.positions] = -step.values
    return back
