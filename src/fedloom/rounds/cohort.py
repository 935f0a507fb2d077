"""The updates of one round: whose they are, what each weighs, and which modules they are about.

A client may train only some modules. Modules that the same clients sent are aggregated together, so that a method never
sees an update that lacks one. Where some clients of the round did not train a module, its average is one of two:

    holders   Σ p_k ΔW_k / Σ p_k over the clients that sent it. A client that did not train a module has no say
              in it (HeteroFL, Diao et al., ICLR 2021, arXiv 2010.01264).
    all       Σ p_k ΔW_k over all clients of the round, those that did not train the module with the ΔW that they had.
              The mean of the models as they are; a module that one client of ten trains moves by a tenth of its step.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedloom.compress.entries import Entry, Values
from fedloom.compress.seeds import derived_seed
from fedloom.lora.pair import subset
from fedloom.methods.method import Aggregate, Context, Entries, Method, State, Update
from fedloom.rounds.checks import UpdateFacts
from fedloom.rounds.decoded import Decoded
from fedloom.rounds.memory import give_back
from fedloom.rounds.stale import Past


@dataclass(eq=False, slots=True)
class Cohort:
    """The clients whose updates are averaged, in order of name: payload, share p_k and what the check saw of each.

    decoded: where the updates wait that are decoded already. reading: the client whose update the method is reading,
    "" before the first and after the last. Where a method fails, this names the suspect. past: client → the older
    version that its update rests on, where it does. sums: region → the sum of its clients' updates, which is read in
    their place.
    """

    payloads: Mapping[str, bytes]
    weights: Mapping[str, float]
    facts: Mapping[str, UpdateFacts]
    decoded: Decoded
    reading: str = ""
    past: Mapping[str, Past] = field(default_factory=dict)
    sums: Mapping[str, bytes] = field(default_factory=dict)

    def groups(self) -> dict[tuple[str, ...], list[str]]:
        """Clients → the modules that exactly they have sent."""
        holders: dict[str, list[str]] = defaultdict(list)
        for client in self.weights:
            for module in self.facts[client].modules:
                holders[module].append(client)
        groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for module in sorted(holders):
            groups[tuple(holders[module])].append(module)
        return groups

    def update(self, client: str, weight: float, state: State, modules: Collection[str]) -> Update:
        """A client's update of some modules; one of an older version as it counts for the present one."""
        entries, past = self.decoded.entries(client, self.payloads, state, modules), self.past.get(client)
        if past is None:
            return Update(client, weight, entries)
        return Update(client, weight, past.bring_forward(entries), past.staleness)

    def digest(self, base: str) -> str:
        """32 hex digits for the state that follows `base` by these updates."""
        hasher = hashlib.blake2b(base.encode(), digest_size=16)
        for client, weight in self.weights.items():
            hasher.update(f"{client}\x00{weight}".encode())
            hasher.update(self.facts[client].digest)
        return hasher.hexdigest()


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """The updates of some modules, which all of these clients sent; those that did not wait are decoded on every pass.

    state: the server's. unchanged: what the clients that did not train these modules would have sent, where they count.
    """

    cohort: Cohort
    weights: Mapping[str, float]
    modules: Collection[str]
    state: State
    unchanged: Update | None = None

    def __iter__(self) -> Iterator[Update]:
        cohort = self.cohort
        if cohort.sums:
            yield from self._sums()
        else:
            for client, weight in self.weights.items():
                cohort.reading = client
                yield cohort.update(client, weight, self.state, self.modules)  # not held: the next one is as large
                give_back(cohort.facts[client].size)
            cohort.reading = ""
        if self.unchanged:
            yield self.unchanged

    def _sums(self) -> Iterator[Update]:
        """The regions' sums, in which the shares are already; decoded on every pass."""
        for region in self.cohort.sums:
            own = self.cohort.decoded.entries(region, self.cohort.sums, self.state, self.modules)
            if own:
                yield Update(region, 1.0, own)


def weigh_groups(cohort: Cohort, module_weighting: str) -> Iterator[tuple[list[str], dict[str, float], float]]:
    """(modules, client → its share of them, the share of those that did not train them), group by group."""
    for clients, modules in cohort.groups().items():
        held = {client: cohort.weights[client] for client in clients}
        others = 1.0 - sum(held.values()) if len(held) < len(cohort.weights) else 0.0
        if others and module_weighting == "holders":
            held = {client: weight / sum(held.values()) for client, weight in held.items()}
            others = 0.0
        yield modules, held, others


def combine(method: Method, state: State, cohort: Cohort, context: Context, module_weighting: str) -> Aggregate:
    """The method's aggregate of the modules that were sent; a module that nobody sent is left out."""
    entries: dict[str, Entry] = {}
    memory, stats = state.memory, []
    kept: dict[str, float] = {}
    for modules, held, others in weigh_groups(cohort, module_weighting):
        part = replace(restrict_state(state, modules), memory=memory)
        unchanged = Update("", others, sent_unchanged(method, part, context)) if others else None
        result = method.aggregate(part, Group(cohort, held, set(modules), state, unchanged), context)
        entries |= result.entries
        memory = result.memory
        kept |= result.kept
        stats.append((len(modules), result.stats))
    return Aggregate(entries, memory, pool_stats(stats), kept)


def restrict_state(state: State, modules: Collection[str]) -> State:
    """The state cut down to some modules; its memory stays whole."""
    parts = (state.adapter, state.frozen, state.tail)
    adapter, frozen, tail = (subset(part, modules) for part in parts)
    return replace(state, adapter=adapter, frozen=frozen, tail=tail)


def sent_unchanged(method: Method, state: State, context: Context) -> Entries:
    """The entries that a client would send if training had changed nothing of `state`; values are not rounded."""

    def exact(values: Values, seed: int) -> Values:
        return values

    seed = derived_seed(context.seed, "unchanged")
    return method.compress(replace(state, memory={}), state.adapter, replace(context, seed=seed, quantize=exact))[1]


def pool_stats(stats: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The numbers of several groups as one: the largest where the name begins with max_, else the mean over modules."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for count, numbers in stats:
        for name, number in numbers.items():
            found[name].append((count, number))
    return {
        name: max(number for _, number in parts)
        if name.startswith("max_")
        else sum(count * number for count, number in parts) / sum(count for count, _ in parts)
        for name, parts in found.items()
    }
