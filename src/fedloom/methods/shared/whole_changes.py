"""Broadcasts that say what changes, every element of it: what rounding loses waits for the next one.

Where `loom` sends the most important elements alone, this sends all of them in a fraction of a bit each.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from fedloom.compress.entries import to_dense
from fedloom.compress.levels import Part
from fedloom.compress.paths import trace_within
from fedloom.methods.method import Aggregate, Context, Facts, Method, State, Update
from fedloom.methods.shared.averaging import weighted_mean, zero_change
from fedloom.methods.shared.dial import BUDGET, Dial, spend_run
from fedloom.methods.shared.guard import Witness
from fedloom.methods.shared.states import LOST, Code, Room, lost_share, send_change
from fedloom.methods.shared.whole import add_to_whole, adopt_whole, read_whole_change


def loom_of_paths(dial: Dial, residual: float, rate: float, guard: bool) -> Method:
    """loom whose broadcasts say what changes, all of it in a fraction of a bit a value."""
    return Method(
        name="loom",
        facts=Facts(
            paper="fedloom (docs/loom.md)",
            unequal_ranks=True,
            sends="ΔA and ΔB in few bits",
            receives="ΔA and ΔB in few bits",
            keeps="server: what rounding left out, its last step",
            broadcasts="elements",
        ),
        updates="change",
        compress=partial(send_change, trace_within, dial.bytes),
        aggregate=partial(broadcast_change, trace_within, dial.bytes, residual, rate, guard),
        receive=add_to_whole,
        adopt=adopt_whole,
        adds=read_whole_change,
        joins=True,
        own_values=True,
        smallest=dial.smallest,
        takes_budget=True,
        default_budget=BUDGET,
        spend=spend_run,
        values="int4",
    )


def broadcast_change(
    code: Code,
    room: Room,
    residual: float,
    rate: float,
    guard: bool,
    state: State,
    updates: Iterable[Update],
    context: Context,
) -> Aggregate:
    """`rate` times the clients' mean and what earlier broadcasts lost, as far as the budget goes, times the gain.

    residual: what a broadcast lost is multiplied by this. With `guard` the step is judged by `shared.guard`.
    """
    witness = Witness(state, guard)
    means = weighted_mean(witness.watch(updates), start=zero_change(state.adapter))
    verdict = witness.judge()
    if verdict.wrong:
        return witness.take_back(verdict, context)
    sums = {name: rate * mean for name, mean in means.items()}
    for name in sums.keys() & state.memory.keys():
        sums[name].add_(state.memory[name], alpha=residual)
    parts: dict[str, Part] = {}
    for module, pair in state.adapter.items():
        gain = verdict.gains[module]
        a, b = (gain * sums[f"{module}/{part}"] for part in ("A", "B"))
        parts[f"{module}/A"] = Part(a, (pair.B + b).norm(dim=0)[:, None])
        parts[f"{module}/B"] = Part(b, pair.A.norm(dim=1)[None])
    entries = code(parts, room(state.adapter, "down", context), context.size).entries
    # What waits is kept without the gain, so that the next round's gain holds for all of it.
    rest = {
        name: (parts[name].values - to_dense(entry)) / verdict.gains[name.rpartition("/")[0]]
        for name, entry in entries.items()
    }
    stats = {LOST: lost_share(parts, entries), **(verdict.stats if guard else {})}
    return Aggregate(
        entries, {**state.memory, **(rest if residual else {}), **witness.remember(verdict, entries)}, stats
    )
