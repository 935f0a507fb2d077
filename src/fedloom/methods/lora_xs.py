"""LoRA-XS in a federation: a coded r × r matrix between two factors that rest, and never travel.

(Bałazy et al., 2024, arXiv 2405.17604)

The change of weight is U R V, where U (m × r) and V (r × n) hold the leading singular vectors of the base weight W0.
Every site has W0, so it computes U and V for itself; what travels is r² values a module, whatever its size. The mean of
the R_k gives the mean of the products, so the average is exact. Where this deviates from the paper:

- R begins at zero, where the paper begins near it, and U has columns of one length, `scale`, where the paper has the
  singular values: with these, directions that W0 hardly uses would hardly train;
- R travels in integer codes within a budget of bytes, up and down, as many bits a value as there is room for. What
  rounding leaves out waits at the server, and with `client_residual` at the client too.

With factors = "random" U and V are signs drawn from the modules' names. They need no base weights and no linear
algebra, and are the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedloom.compress.entries import Sparse, to_dense
from fedloom.compress.levels import Part, code_within, coded, empty
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraPair, LoraState, core_matrix, module_of
from fedloom.methods.method import CORE, Aggregate, Context, Entries, Facts, Method, State, Update
from fedloom.methods.shared.averaging import code_dense, weighted_mean
from fedloom.methods.shared.dial import BUDGET, Dial, spend_on_core
from fedloom.methods.shared.resting import Factors, ReadWeight, Resting
from fedloom.methods.shared.states import LOST
from fedloom.methods.shared.whole import adopt_whole, whole_adapter

_EVEN = torch.ones(1, 1)  # the weights of R's elements: U and V have orthogonal columns and rows of one length


def lora_xs(
    *,
    factors: Factors = "svd",
    scale: float = 4.0,
    upload_share: float = 0.42,
    taper: float = 0.0,
    server_residual: float = 1.0,
    client_residual: float = 0.0,
    broadcast: Literal["change", "state"] = "change",
    coded: bool = True,
) -> Method:
    """A core R between factors of the base weights, in as many bits as wire.budget has room for (1 % of dense fp32).

    factors: "svd", the leading singular vectors of the base weights, or "random", seeded signs.
    scale: length of U's columns, by which a step of R moves the weights further.
    upload_share, taper: how the bytes are divided over both ways and over the rounds (see loom).
    server_residual, client_residual: what a payload leaves out is multiplied by this and added to its sender's next.
    broadcast: "change", or "state": the whole of R rounded anew, so that the newest is enough, for runs in which few
    clients attend a round; what rounding leaves out waits there whatever server_residual says.
    coded: without it all of R travels in the form that wire.values says, fp32 by default, and there is no budget.
    """
    if not scale > 0:
        raise ConfigError(f"method.scale is {scale}: expected more than 0")
    for key, share in (("server_residual", server_residual), ("client_residual", client_residual)):
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"method.{key} is {share}: expected 0 to 1")
    dial = Dial(upload_share, 1.0, taper, newest=broadcast == "state")
    residual = 1.0 if broadcast == "state" else server_residual
    return _between(Resting(factors, scale), Coding(dial, coded), residual, client_residual)


@dataclass(frozen=True, slots=True)
class Coding:
    """How values are coded: within the dial's budget, or as the run says."""

    dial: Dial
    within: bool

    def code(self, parts: Mapping[str, Part], way: str, state: State, context: Context) -> Entries:
        """The entries of a payload up or down."""
        if not self.within:
            return {name: code_dense(name, part.values, context) for name, part in parts.items()}
        entries = code_within(parts, self.dial.bytes(state.adapter, way, context), context.size).entries
        return entries if any(entry.values.numel() for entry in entries.values()) else _largest_value(parts)


def _largest_value(parts: Mapping[str, Part]) -> Entries:
    """One value, even where it does not fit: a run whose budget has no room for one is refused before it starts."""
    entries = {name: empty(part) for name, part in parts.items()}
    name = max(sorted(parts), key=lambda name: float(parts[name].values.abs().max()))
    values = parts[name].values
    place = values.abs().argmax().reshape(1)
    code = values.flatten()[place]
    entries[name] = Sparse(tuple(values.shape), place, coded(code.sign().to(torch.int8), float(code.abs()), 4))
    return entries


def _between(resting: Resting, coding: Coding, residual: float, own: float) -> Method:
    """The method with these resting factors."""

    def on_base(method: Method, adapter: LoraState, read: ReadWeight) -> Method:
        found = _between(resting.on_base(adapter, read), coding, residual, own)
        return replace(method, compress=found.compress, receive=found.receive, core=found.core, begin=found.begin)

    within, whole = coding.within, coding.dial.newest
    form = " in few bits" if within else ""
    return Method(
        name="lora-xs",
        facts=Facts(
            paper="LoRA-XS (arXiv 2405.17604)",
            unequal_ranks=True,
            exact=not within,
            sends=f"the change of R, r × r{form}",
            receives=f"{'' if whole else 'the change of '}R, r × r{form}",
            keeps=f"server: R exactly; all: the resting pair{', what coding left out' if own else ''}",
            broadcasts="elements",
        ),
        updates="change",
        compress=partial(send_core, resting, coding, own),
        aggregate=partial(broadcast_core, coding, residual),
        receive=partial(take_core, resting, whole),
        adopt=adopt_whole,
        core=resting,
        begin=resting.begin,
        on_base=on_base,
        adds=read_core_change,
        replaces=(CORE,) if whole else (),
        joins=True,
        own_values=within,
        takes_budget=within,
        default_budget=BUDGET if within else 0.0,
        smallest=coding.dial.smallest if within else None,
        spend=spend_on_core if within else None,
        values="int4" if within else "fp32",
    )


def send_core(
    resting: Resting, coding: Coding, own: float, state: State, after: LoraState, context: Context
) -> tuple[Mapping[str, Tensor], Entries]:
    """The change of R of every trained module, one row for every component that is trained."""
    pairs, parts = resting(state), {}
    for module, pair in after.items():
        name = f"{module}/{CORE}"
        change = core_matrix(pair.A - state.adapter[module].A, pairs[module].A)
        waits = state.memory.get(name)
        # As it is without a residual: the mean of many must not shrink. With one, what is missing comes later.
        parts[name] = Part(change if waits is None else change + own * waits, _EVEN, whole=not own)
    entries = coding.code(parts, "up", state, context)
    return ({**state.memory, **_rest(parts, entries)} if own else state.memory), entries


def _rest(parts: Mapping[str, Part], entries: Entries) -> dict[str, Tensor]:
    return {name: parts[name].values - to_dense(entry) for name, entry in entries.items()}


def read_core_change(entries: Entries, adapter: LoraState) -> dict[str, Tensor]:
    """A client's changes of R as changes of the whole of it: rows that it does not train have none."""
    changes = {}
    for name, entry in entries.items():
        sent = to_dense(entry)
        changes[name] = torch.nn.functional.pad(sent, (0, 0, 0, adapter[module_of(name)].rank - sent.shape[0]))
    return changes


def broadcast_core(
    coding: Coding, residual: float, state: State, updates: Iterable[Update], context: Context
) -> Aggregate:
    """The mean change of R and what earlier broadcasts left out; or the whole of R, to which they add up."""
    means = weighted_mean(updates, read=lambda entries: read_core_change(entries, state.adapter))
    parts = {
        name: Part(mean + residual * state.memory[name] if name in state.memory else mean, _EVEN)
        for name, mean in means.items()
    }
    entries = coding.code(parts, "down", state, context)
    rest = _rest(parts, entries)
    lost = sum(float(tensor.square().sum()) for tensor in rest.values())
    whole = sum(float(part.values.square().sum()) for part in parts.values())
    kept = {name: part.values for name, part in parts.items()} if coding.dial.newest else rest
    return Aggregate(entries, {**state.memory, **kept}, {LOST: lost / whole if whole else 0.0})


def take_core(resting: Resting, whole: bool, state: State, entries: Entries, context: Context) -> State:
    """A = R V with the R that was broadcast, or A changed by its change; a module that was not sent stays."""
    held, pairs, changed = whole_adapter(state), resting(state), {}
    for module, pair in held.items():
        entry = entries.get(f"{module}/{CORE}")
        if entry is not None:
            product = to_dense(entry) @ pairs[module].A
            changed[module] = LoraPair(product if whole else pair.A + product, pair.B)
    return adopt_whole(state, LoraState({**held, **changed}), state.frozen)
