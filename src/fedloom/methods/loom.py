"""loom: both factors, sparse and few bits a value, both ways, within a budget of bytes (fedloom's own; docs/loom.md).

Clients send the signs of the most important elements of ΔA and ΔB. The server averages them and broadcasts the signs of
the most important elements of the mean; what it leaves out waits for the next rounds. How many elements travel follows
from the budget alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedloom.compress.entries import Sparse
from fedloom.compress.levels import code_within
from fedloom.compress.paths import trace_within
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import (
    Aggregate,
    Compress,
    Context,
    Entries,
    Facts,
    Method,
    Reduce,
    State,
    Update,
    both_factors,
)
from fedloom.methods.shared.averaging import add_weighted, only_b, weighted_mean
from fedloom.methods.shared.dial import BUDGET, Dial, spend_run
from fedloom.methods.shared.drawn import drawn_places, send_at_drawn
from fedloom.methods.shared.guard import Witness
from fedloom.methods.shared.listed import Delta, fill_payload
from fedloom.methods.shared.states import loom_of_states
from fedloom.methods.shared.undoing import take_back_within
from fedloom.methods.shared.whole import add_to_whole, adopt_whole, read_whole_change
from fedloom.methods.shared.whole_changes import loom_of_paths

_SPREAD = 1 / 8  # bits of payload for an element of the adapter; below this a smaller rank does better (docs/loom.md)
_WIDER = {0.04: "int4", 0.12: "int8"}  # forms of values above so large a share of dense fp32; signs below
_B_AS_PATHS = (
    "method.trainable = 'B' is for changes as paths: set method.coding = 'paths' and leave method.broadcast at "
    "'change', or unset method.trainable"
)
_RARE = 3.0  # broadcasts a turn above which sending the whole adapter anew is worth a try (docs/LOG.md)


def loom(
    *,
    upload_share: float = 0.42,
    step: float = 3.0,
    server_residual: float = 0.9,
    max_density: float = 1.0,
    taper: float = 0.0,
    importance: bool = True,
    step_guard: bool = True,
    broadcast: Literal["change", "state"] = "change",
    coding: Literal["auto", "codes", "paths"] = "auto",
    server_learning_rate: float = 1.0,
    positions: Literal["own", "shared"] = "own",
    trainable: Literal["both", "B"] = "both",
) -> Method:
    """The most important elements of both factors, up and down, as signs where the budget is small.

    wire.budget (1 % of dense fp32 unless it is set) holds for the mean payload over both ways and all rounds. Where it
    has no room for one element of every tensor, those tensors have one whose element changes most.
    upload_share: the part of the bytes of both ways that goes up.
    taper: the bytes of a round fall in a line, from 1 + taper times the mean to 1 − taper times; below 0 they rise.
    step: what a client sends of a tensor has the L1 norm of its whole change, but at most `step` times its L2 norm.
    server_residual: what a broadcast leaves out is multiplied by this and added to the next one.
    max_density: largest share of a tensor's elements that is sent, whatever the budget.
    importance: judge an element by what it changes in ΔW (FedSRD, eq. 4–5), not by its magnitude alone.
    step_guard: shorten the server's steps, or take one back, where the clients undo the last one (`shared.guard`).
    broadcast: "change", or "state": the whole adapter rounded anew (`shared.states`), so that the newest is enough, for
    runs in which few clients attend a round; step, server_residual, max_density and importance do nothing there.
    coding: "codes", each value by itself: signs, 4 or 8 bits; or "paths", all values together in a fraction of a bit
    each (`compress.paths`), where step, max_density and importance do nothing. "auto" is paths for whole adapters, and
    codes for changes unless server_learning_rate is set or wire.client_budget chooses.
    server_learning_rate: the server goes so many times the clients' mean; codes of changes are stretched by `step`.
    positions: "own", each client's most important elements, or "shared": elements that all draw alike from the state
    that a round rests on (`shared.drawn`), so that no positions go up and what clients send adds up element by element.
    trainable: "both", or "B": A rests at its seeded start (FFA-LoRA), so that a rank takes half the values; for changes
    as paths only.
    Unless wire.values says otherwise, values travel as signs for a budget in bytes or up to 4 % of dense fp32, in 4
    bits up to 12 %, and in 8 bits above.
    """
    dial = Dial(upload_share, max_density, taper, newest=broadcast == "state")
    _check_numbers(server_residual, step, server_learning_rate)
    if positions == "shared" and (broadcast == "state" or coding == "paths"):
        key = "broadcast = 'state'" if broadcast == "state" else "coding = 'paths'"
        raise ConfigError(f"method.positions = 'shared' has no meaning with method.{key}: unset one")
    paths = broadcast == "change" and (coding == "paths" or (coding == "auto" and server_learning_rate != 1.0))
    if trainable == "B" and not paths:
        raise ConfigError(_B_AS_PATHS)
    if broadcast == "state":
        code = code_within if coding == "codes" else trace_within
        return loom_of_states(dial, code, server_learning_rate, step_guard)
    if paths:
        parts = only_b if trainable == "B" else both_factors
        return loom_of_paths(dial, server_residual, server_learning_rate, step_guard, parts)
    if server_learning_rate != 1.0:
        raise ConfigError("method.server_learning_rate is set, and codes of changes have method.step: unset one")
    send = partial(send_signs, dial, step, importance)
    made = loom_of_changes(dial, send, partial(broadcast_signs, dial, server_residual, importance, step_guard))
    if coding == "codes" or positions == "shared":
        made = replace(made, spend=partial(spend_run, paths=False))
    return at_shared_positions(made, dial, step) if positions == "shared" else made


def _check_numbers(residual: float, step: float, rate: float) -> None:
    if not 0.0 <= residual <= 1.0:
        raise ConfigError(f"method.server_residual is {residual}: expected 0 to 1")
    if step <= 0.0:
        raise ConfigError(f"method.step is {step}: expected more than 0")
    if rate <= 0.0:
        raise ConfigError(f"method.server_learning_rate is {rate}: expected more than 0")


def loom_of_changes(dial: Dial, send: Compress, combine: Reduce) -> Method:
    """loom whose broadcasts say what changes."""
    return Method(
        name="loom",
        facts=Facts(
            paper="fedloom (docs/loom.md)",
            unequal_ranks=True,
            sends="important elements of ΔA and ΔB",
            receives="important elements of ΔA and ΔB",
            keeps="server: what it did not send, its last step",
            broadcasts="elements",
        ),
        updates="change",
        compress=send,
        aggregate=combine,
        receive=add_to_whole,
        adopt=adopt_whole,
        adds=read_whole_change,
        joins=True,
        smallest=dial.smallest,
        advise=partial(advise_on_budget, dial),
        takes_budget=True,
        default_budget=BUDGET,
        spend=spend_run,
        values="sign",
        wider=_WIDER,
    )


def at_shared_positions(method: Method, dial: Dial, step: float) -> Method:
    """The method whose clients send elements that both sides draw; what is drawn of B follows from its rank."""
    sends = "elements of ΔA and ΔB that both sides draw"
    return replace(
        method,
        facts=replace(method.facts, unequal_ranks=False, sends=sends),
        compress=partial(send_at_drawn, dial, step),
        support=partial(drawn_places, dial),
    )


def advise_on_budget(dial: Dial, adapter: LoraState, context: Context) -> str:
    """A sentence for the user where a payload has too few bits for so many elements, with what helps; else ""."""
    mean = replace(context, num_rounds=0)
    bits = 8 * min(dial.bytes(adapter, way, mean) for way in ("up", "down")) / max(adapter.numel(), 1)
    if bits >= _SPREAD:
        return ""
    rare = context.downloads > _RARE
    return (
        f"wire.budget leaves a payload {bits:.2g} bits for every element of the adapter: a smaller lora.r with a "
        "higher training.learning_rate, or a larger budget, may well end higher"
        + (f", and so may method.broadcast = 'state', with {context.downloads:.0f} broadcasts a turn" * rare)
        + " (docs/loom.md)"
    )


def send_signs(
    dial: Dial, step: float, importance: bool, state: State, after: LoraState, context: Context
) -> tuple[Mapping[str, Tensor], Entries]:
    """The most important elements of ΔA and ΔB, as many as the budget has room for."""

    def moved(module: str) -> dict[str, Delta]:
        before, now = state.adapter[module], after[module]
        return {
            f"{module}/A": Delta(now.A, before.A, now.B if importance else None, "A", step),
            f"{module}/B": Delta(now.B, before.B, before.A if importance else None, "B", step),
        }

    return fill_payload(moved, dial.bytes(state.adapter, "up", context), dial.most, state, context)


def broadcast_signs(
    dial: Dial,
    residual: float,
    importance: bool,
    guard: bool,
    state: State,
    updates: Iterable[Update],
    context: Context,
) -> Aggregate:
    """The most important elements of the clients' mean and of what earlier broadcasts left out, times the gain."""
    witness = Witness(state, guard)
    waiting = {
        name: residual * state.memory[name] if name in state.memory else torch.zeros_like(tensor)
        for name, tensor in state.adapter.tensors().items()
    }
    sums = weighted_mean(witness.watch(updates), start=waiting)
    verdict = witness.judge()
    if verdict.wrong:
        return take_back_within(witness, verdict, dial.bytes(state.adapter, "down", context), context)
    gains = {name: verdict.gains[name.rpartition("/")[0]] for name in sums}
    for name, gain in gains.items():
        if gain < 1.0:
            sums[name].mul_(gain)

    def moved(module: str) -> dict[str, Delta]:
        pair, a, b = state.adapter[module], sums[f"{module}/A"], sums[f"{module}/B"]
        others = (pair.B + b, pair.A) if importance else (None, None)
        return {f"{module}/A": Delta(a, None, others[0], "A"), f"{module}/B": Delta(b, None, others[1], "B")}

    memory, entries = fill_payload(moved, dial.bytes(state.adapter, "down", context), dial.most, state, context)
    # What waits is kept without the gain, so that the next round's gain holds for all of it.
    rest = {name: _left(sums[name], entry, gains[name]) for name, entry in entries.items()} if residual else {}
    sent = sum(entry.positions.numel() for entry in entries.values())
    stats = {"density": sent / max(state.adapter.numel(), 1), **(verdict.stats if guard else {})}
    return Aggregate(entries, {**state.memory, **memory, **rest, **witness.remember(verdict, entries)}, stats)


def _left(total: Tensor, sent: Sparse, gain: float) -> Tensor:
    """(total − sent) / gain, in the memory of `total`."""
    add_weighted(total, sent, -1.0)
    return total if gain == 1.0 else total.div_(gain)
