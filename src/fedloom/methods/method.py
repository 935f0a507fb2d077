"""The shape of a federated method: one frozen record of plain functions over frozen state.

A method decides what travels and how it is combined; it never sees bytes, engines or models. Its settings
are bound when the record is built: the builder's keyword arguments are the keys of [method].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedloom.compress.budget import Budget
from fedloom.compress.entries import Entry
from fedloom.compress.sparsify import Quantize
from fedloom.lora.pair import PARTS, LoraState, narrow, stack
from fedloom.methods.forward import ForwardOnly
from fedloom.methods.spending import RunShape, Spending

Entries = Mapping[str, Entry]
CORE = "R"
"""The part of a module that is the matrix between two resting factors: "module/R"."""
SCALARS = "S"
"""The part of a module that says how far it goes along directions that everybody draws: "module/S" (see `forward`)."""
FROZEN = "frozen_"
"""Prefix of the entries that hold merged increments: "module/frozen_A"."""
CURVATURE = "curvature_"
"""Prefix of the entries of a full state that hold `State.curvature`: "module/curvature_A"."""
SHARED = ("adapter", "frozen", "tail", "curvature")
"""The parts of a `State` that are the same for every participant of the same ranks."""


@dataclass(frozen=True, eq=False, slots=True)
class State:
    """What one participant, the server or a client, holds between rounds.

    adapter: the pair that is trained on. frozen: merged increments of merging methods, in factored form, the same for
    all. tail: components of the global adapter beyond this participant's own rank, replaced by every change. The model
    in use is W0 + frozen + tail + adapter. curvature: of every element of the adapter, the same for all, where a method
    scales directions by it; empty where it is 1 everywhere (see `forward.ForwardOnly`). memory: what stays private to
    the participant (a client's residual, a server's moments), by name. version counts the changes since the start,
    consolidations included; digest names the global state.
    """

    adapter: LoraState
    frozen: LoraState = field(default_factory=LoraState)
    tail: LoraState = field(default_factory=LoraState)
    curvature: LoraState = field(default_factory=LoraState)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    version: int = 0
    digest: str = ""

    @property
    def fixed(self) -> LoraState:
        """All that the model in use has beside the trained pair."""
        return stack([self.frozen, self.tail])

    @property
    def total(self) -> LoraState:
        """The whole change of weight, W − W0, as one state."""
        return stack([self.adapter, self.frozen, self.tail])

    @property
    def shared(self) -> tuple[LoraState, ...]:
        """The parts named in SHARED."""
        return self.adapter, self.frozen, self.tail, self.curvature

    def numel(self) -> int:
        """Number of values in `shared`."""
        return sum(part.numel() for part in self.shared)


@dataclass(frozen=True, eq=False, slots=True)
class Update:
    """One client's contribution: its share p_k of the round (shares sum to 1) and its entries.

    staleness: versions that the server has gone on since the client's training began, always 0 in synchronous rounds.
    Entries of an older version are here as they count for the present one (`rounds.stale`).
    """

    client: str
    weight: float
    entries: Entries
    staleness: int = 0


def no_bytes(entries: Entries) -> int:
    """A `Context.size` for use outside a round, where nothing travels: always 0."""
    return 0


@dataclass(frozen=True, slots=True)
class Context:
    """Arguments that every step of a round has: 1-based round number, the run's seed, the value coding.

    budget: what a client's payload may take, None where it is not limited. size: what a payload with these entries
    takes, in bytes; `compress` and `aggregate` may ask. num_rounds: of the whole run, 0 where that is not known.
    downloads, start: see `rounds.Job`. moved: how far a client's training went along each of the directions of
    `Method.forward`, (at most as many,); empty where it went along none. summed_bits: of a value on the way up where
    the server learns the sum of all clients' values alone (`rounds.secure`), 0 where each sends a payload of its own.
    """

    round: int
    seed: int
    quantize: Quantize
    budget: Budget | None = None
    size: Callable[[Entries], int] = no_bytes
    num_rounds: int = 0
    downloads: float = 1.0
    start: LoraState = field(default_factory=LoraState, repr=False)
    moved: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    summed_bits: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Aggregate:
    """The outcome of a round on the server: what to broadcast, the server's new memory, numbers worth recording.

    Where modules are aggregated in groups, the largest counts of stats called max_…, of others the mean over modules.
    kept: module → the share of the energy ‖ΔW‖² of the clients' sum that the broadcast keeps, where the method cuts it.
    """

    entries: Entries
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Facts:
    """The row of a method in the table that `fedloom methods` prints; the defaults are FedAvg's.

    paper: name and source. exact: the aggregate is Σ p_k B_k A_k, nothing lost. unequal_ranks: clients may differ in
    rank. own_part: a client of lower rank uses the leading components of the server's adapter alone, so that its model
    is not that of the others; else all use the whole of it. sends, receives, keeps: in words, what a client sends and
    receives, and what is kept between rounds.

    broadcasts: what the server's entries are. "factors" and "change" are a mean of factors or of their changes, over
    which a server optimiser can be put; "elements" are some of a mean, the rest waits; "components" are those of a sum
    of products; "step" is a step of the server's own; "scalars" are steps along drawn directions. one_factor: a
    broadcast changes B or A, in turn, whatever the clients trained. stateless: the server's step needs the updates
    alone, so that it can merge adapters offline; its rank is then that of the server's adapter ("rank"), that which the
    share `tau` of Σσ² takes ("energy"), or follows from the adapters ("").
    """

    paper: str
    exact: bool = False
    unequal_ranks: bool = False
    own_part: bool = False
    sends: str = "A and B, dense"
    receives: str = "A and B, dense"
    keeps: str = "nothing"
    broadcasts: Literal["factors", "change", "elements", "components", "step", "scalars"] = "factors"
    one_factor: bool = False
    stateless: bool = False
    truncates: Literal["", "rank", "energy"] = ""


class Compress(Protocol):
    """(client state, adapter after training, context) → (memory to keep, entries to send)."""

    def __call__(self, state: State, after: LoraState, context: Context) -> tuple[Mapping[str, Tensor], Entries]: ...


class Reduce(Protocol):
    """(server state, updates, context) → what to broadcast. `updates` can be iterated more than once."""

    def __call__(self, state: State, updates: Iterable[Update], context: Context) -> Aggregate: ...


class Adopt(Protocol):
    """(state, global adapter, merged increments) → the state brought to them, cut to the participant's own ranks."""

    def __call__(self, state: State, adapter: LoraState, frozen: LoraState) -> State: ...


class Receive(Protocol):
    """(state, decoded broadcast, context) → the state with adapter and frozen brought up to date.

    The server and every client run this same function on the same decoded entries.
    """

    def __call__(self, state: State, entries: Entries, context: Context) -> State: ...


def adopt_leading(state: State, adapter: LoraState, frozen: LoraState) -> State:
    """Adopt a global state the usual way: keep the leading components up to the own rank, drop the others."""
    return replace(state, adapter=narrow(adapter, state.adapter.ranks()), frozen=frozen)


def send_all(entries: Entries, ranks: Mapping[str, int]) -> Entries:
    """Every client is sent the whole broadcast."""
    return entries


def both_factors(round: int) -> tuple[str, ...]:
    """A and B are trained in every round."""
    return PARTS


def as_sent(entries: Entries) -> Entries:
    """The entries say elements, and are left as they are."""
    return entries


def no_advice(adapter: LoraState, context: Context) -> str:
    """Nothing to say beforehand."""
    return ""


def no_core(state: State) -> LoraState:
    """An empty core: the factors themselves are trained, not a matrix between them."""
    return LoraState()


def as_given(adapter: LoraState) -> LoraState:
    """The adapter that a run begins with, as it is."""
    return adapter


@dataclass(frozen=True, slots=True)
class Method:
    """One way to federate LoRA.

    spend(what the run is): how it divides the bytes of a whole run (see `spending`); None where it cannot.
    adopt: bring a participant to a full state. narrow: cut a broadcast down to what a client of given ranks needs.
    penalty(before, now): is added to a client's loss; `now` holds live parameters. takes_budget: compress keeps to
    context.budget, which is the share default_budget of dense fp32 where none is set (0: no limit). values: the form of
    values that wire.values = "auto" means; wider (share → form): what takes its place under a budget above that share.
    needs_start: its steps ask for `Context.start`.
    replaces: the parts of a module of which a broadcast says all there is: one with these of every module replaces the
    whole adapter, so that the newest brings any participant in step; of methods that alternate the newest two do
    together. Empty where broadcasts are changes.
    merges: only the product of State.frozen matters, so that it may be recompressed. module_subsets: clients may train
    some of the modules only. own_values: it rounds values itself, and takes no wire.values. joins: payloads of few
    values travel together (see `rounds.joint`). smallest(first adapter, context): bytes of the smallest payload of a
    run, either way; its budget must leave room for one element.
    updates: what a client's entries are, where they still mean something when the server has gone on: a "change" of the
    factors, or the "factors" after it. Empty where they mean something beside those of the same version alone; such a
    method has synchronous rounds only (`rounds.stale`).
    plain: a client's entries with the elements of what they say, where they say it in other coordinates; for whoever
    looks at what clients send, such as rules on updates.
    advise(first adapter, context): what a user should know of the settings, or "".
    adds(entries, adapter): the tensors T_k that a client's entries stand for, as large as those of the server's
    `adapter`, where Σ p_k T_k is all that `aggregate` needs of the updates: sums of clients then add up (see
    `rounds.regions`), and `aggregate` takes one as the entries of an update of share 1. None where that is not so.
    support(state, context): name → the flat places of the T_k at which a client may send anything, ascending, as client
    and server know them beforehand from what both have: the server's adapter, the round, the run's seed. A secure sum
    (`rounds.secure`) is of these alone. A name that is left out has all its places; None: all have.

    begin(adapter): the adapter that a run begins with, from the seeded one, whose digest names it all the same.
    on_base(method, first adapter, read): this method for a run on a base model, where it takes something from its
    weights; read(module) is W0 (m × n), and may raise ConfigError. None for a method that needs none.

    core(state) is empty, or the resting pairs (V, U) between which a matrix R is trained instead of the factors: the
    adapter is A = R V and B = U, the rows of V orthonormal (or zero). V and U have the rank r of the server's adapter.
    A participant of rank q has q rows of R (q × r) and the first q columns of U.

    forward: clients train by forward passes alone, along directions drawn from seeds, and send one number a direction
    instead of factors (see `forward.ForwardOnly`). None: by gradients.
    """

    name: str
    facts: Facts
    compress: Compress
    aggregate: Reduce
    receive: Receive
    adopt: Adopt = adopt_leading
    trainable: Callable[[int], tuple[str, ...]] = both_factors
    narrow: Callable[[Entries, Mapping[str, int]], Entries] = send_all
    penalty: Callable[[LoraState, LoraState], Tensor] | None = None
    takes_budget: bool = False
    needs_start: bool = False
    default_budget: float = 0.0
    values: str = "fp32"
    wider: Mapping[float, str] = field(default_factory=dict)
    merges: bool = False
    module_subsets: bool = True
    joins: bool = False
    own_values: bool = False
    replaces: tuple[str, ...] = ()
    updates: Literal["", "change", "factors"] = ""
    plain: Callable[[Entries], Entries] = as_sent
    smallest: Callable[[LoraState, Context], int] | None = None
    adds: Callable[[Entries, LoraState], Mapping[str, Tensor]] | None = None
    support: Callable[[State, Context], Mapping[str, Tensor]] | None = None
    core: Callable[[State], LoraState] = no_core
    forward: ForwardOnly | None = None
    advise: Callable[[LoraState, Context], str] = no_advice
    spend: Callable[[RunShape, float], Spending] | None = None
    begin: Callable[[LoraState], LoraState] = as_given
    on_base: Callable[[Method, LoraState, Callable[[str], Tensor]], Method] | None = None

    def budget(self, given: Budget | None) -> Budget | None:
        """The budget that is kept to: the one that is given, else the method's own, if it has one."""
        return given or (Budget(self.default_budget) if self.default_budget else None)

    def form(self, given: Budget | None = None) -> str:
        """The form of values meant by wire.values = "auto"; a budget in bytes leaves it as it is without one."""
        kept = self.budget(given)
        reached = [share for share in self.wider if kept and kept.share > share]
        return self.wider[max(reached)] if reached else self.values

    def cuts(self, adapter: LoraState, ranks: Mapping[str, int]) -> bool:
        """Whether `narrow` may change a broadcast of this adapter for a client of these ranks."""
        return self.narrow is not send_all and any(ranks.get(m, pair.rank) < pair.rank for m, pair in adapter.items())

    def says_all(self, names: Collection[str], adapter: LoraState) -> bool:
        """Whether a broadcast of these tensors needs none before it: it replaces all that changes in `adapter`."""
        wanted = {f"{module}/{part}" for module in adapter for part in self.replaces}
        return bool(wanted) and wanted <= set(names)

    @property
    def alternates(self) -> bool:
        """Whether other factors are trained in even rounds than in odd ones."""
        return self.trainable(1) != self.trainable(2)

    def parts(self, state: State, round: int) -> tuple[str, ...]:
        """The parts of a module that are sent in a round: "A", "B" or both; "R" of a core; "S" for scalars."""
        if self.forward:
            return (SCALARS,)
        return (CORE,) if self.core(state) else self.trainable(round)
