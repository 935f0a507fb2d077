"""A tree of servers: each region sums its clients' updates, and the root has one payload a region.

    clients ─updates→ region ─facts→ root ─shares→ region ─sum→ root ─broadcast→ region ─the same bytes→ clients

A region checks its clients' updates as a server does, and tells the facts: examples, norm, modules and digest of each.
Only the root sees all norms and all numbers of examples. So it decides who is out of proportion and what each client
counts for, as it does without regions. A region then sends S = Σ p_k T_k over its clients, with the root's shares, in
fp32, and the root adds the sums up. Every method can do this whose aggregate needs nothing of the updates but such a
sum (`Method.adds`).

Sums of fp32 numbers round. Where they are exact, the root's state and broadcast are those of one server, bit for bit;
elsewhere they differ by the order in which numbers were added.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedloom.compress.entries import Entry, Sparse, dense_entry
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import Entries, Method, State
from fedloom.methods.shared.averaging import weighted_mean
from fedloom.rounds.caps import Caps
from fedloom.rounds.checks import MOST_EXAMPLES, UpdateFacts, check_update
from fedloom.rounds.cohort import Cohort, Group, weigh_groups
from fedloom.rounds.job import Job, sender_digest
from fedloom.wire import Header, Message, encode, read_header

Tell = Callable[[str, Literal["up", "down"], str, int], None]
"""(region, "up" or "down", kind, bytes): called for everything that travels between a region and the root."""
Shares = Sequence[tuple[Collection[str], Mapping[str, float]]]
"""(modules, client → its share of them), for all modules that a region's clients have sent."""

Read = Callable[[Entries, LoraState], Mapping[str, Tensor]]

_ZEROS = 1 / 16
"""Share of zeros from which a sum is sent sparse: positions cost at most one bit an element, a value 32."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The regions of a run, each with its clients, and who is told of what travels between them and the root."""

    regions: Mapping[str, Sequence[str]]
    tell: Tell

    def report(
        self,
        passed: Mapping[str, UpdateFacts],
        refused: Mapping[str, str],
        modules: Collection[str],
    ) -> tuple[dict[str, UpdateFacts], dict[str, str]]:
        """What the regions have found of their clients' updates, as the root is told it; both in order of name.

        A region none of whose clients sent anything says nothing. modules: those of the adapter.
        """
        known: dict[str, UpdateFacts] = {}
        faults: dict[str, str] = {}
        for region, clients in self.regions.items():
            good = {client: passed[client] for client in clients if client in passed}
            bad = {client: refused[client] for client in clients if client in refused}
            if good or bad:
                told = write_facts(good, bad, modules)
                self.tell(region, "up", "facts", len(told))
                own, wrong = read_facts(told, modules)
                known, faults = known | own, faults | wrong
        return dict(sorted(known.items())), dict(sorted(faults.items()))

    def sum_up(self, job: Job, state: State, cohort: Cohort, round: int) -> dict[str, bytes]:
        """Region → the payload with its clients' sum; a region without a client in the cohort sends none.

        Raises what the method raises for an update, and a FedloomError for a sum that is none of this adapter.
        """
        groups = list(weigh_groups(cohort, job.module_weighting))
        sums: dict[str, bytes] = {}
        for region, clients in self.regions.items():
            own = set(clients)
            shares = [(modules, {c: p for c, p in held.items() if c in own}) for modules, held, _ in groups]
            held_here = [(modules, held) for modules, held in shares if held]
            if not held_here:
                continue
            told = write_shares(held_here, state.adapter)
            self.tell(region, "down", "shares", len(told))
            sums[region] = sum_region(job, state, cohort, region, read_shares(told, state.adapter), round)
            self.tell(region, "up", "sum", len(sums[region]))
            # A sum is held to what an update is, but for the caps: they are for clients.
            check_update(replace(job, ranks={}, caps=Caps()), state, region, sums[region], round)
        return sums


def cannot_add(method: Method, others: Iterable[str] = ()) -> ConfigError:
    """The error about a method whose updates cannot be summed in a region. others: names of some that can."""
    can = ", ".join(others)
    return ConfigError(
        f"federation.regions: the updates of method {method.name!r} do not add. Its server needs every client's "
        f"update, so a region could only hand them on. Leave regions out{f', or use one of {can}' if can else ''}"
    )


def sum_region(job: Job, state: State, cohort: Cohort, region: str, shares: Shares, round: int) -> bytes:
    """The regional server's part: Σ p_k T_k over its clients of every tensor that they sent, as one payload."""
    read = job.method.adds
    if read is None:
        raise cannot_add(job.method)
    sums: dict[str, Tensor] = {}
    for modules, held in shares:
        sums |= weighted_mean(Group(cohort, held, set(modules), state), read=partial(_read, read, state.adapter))
    summed = {client for _, held in shares for client in held}
    examples = sum(read_header(cohort.payloads[client]).num_examples for client in summed)
    sender = sender_digest(region, state.digest, round)
    header = Header(
        "update", job.method.name, round, state.version, state.digest, sender, min(max(examples, 1), MOST_EXAMPLES)
    )
    return encode(Message(header, {name: shorter_sum(tensor) for name, tensor in sums.items()}))


def _read(read: Read, adapter: LoraState, entries: Entries) -> Mapping[str, Tensor]:
    return read(entries, adapter)


def shorter_sum(tensor: Tensor) -> Entry:
    """The values of a sum as they are, fp32: sparse where enough of them are zero, otherwise dense."""
    flat = tensor.flatten()
    positions = flat.nonzero().squeeze(1)
    if flat.numel() - positions.numel() < _ZEROS * flat.numel():
        return dense_entry(tensor)
    return Sparse(tuple(tensor.shape), positions, flat[positions].to(torch.float32))


def write_facts(
    passed: Mapping[str, UpdateFacts],
    refused: Mapping[str, str],
    modules: Collection[str],
) -> bytes:
    """What a region tells the root of its clients' updates; size and digest are of the payload that was checked.

    Sets of modules are told once, and the set of all `modules` as null.
    """
    sets: list[list[str] | None] = []
    clients = {}
    for client, one in passed.items():
        own = None if one.modules == set(modules) else sorted(one.modules)
        if own not in sets:
            sets.append(own)
        clients[client] = [one.examples, one.norm, sets.index(own), one.size, one.digest.hex()]
    return _dump({"modules": sets, "clients": clients, "refused": dict(refused)})


def read_facts(told: bytes, modules: Collection[str]) -> tuple[dict[str, UpdateFacts], dict[str, str]]:
    """(client → facts of its update, where it may be averaged; client → why it may not)."""
    said = json.loads(told)
    sets = [frozenset(modules if own is None else own) for own in said["modules"]]
    facts = {
        client: UpdateFacts(examples, sets[place], norm, bytes.fromhex(digest), size)
        for client, (examples, norm, place, size, digest) in said["clients"].items()
    }
    return facts, said["refused"]


def write_shares(shares: Shares, modules: Collection[str]) -> bytes:
    """What the root tells a region: its clients' shares of groups of modules, null for all `modules`."""
    return _dump([[None if set(own) == set(modules) else list(own), dict(held)] for own, held in shares])


def read_shares(told: bytes, modules: Collection[str]) -> Shares:
    """The shares that `write_shares` has written; floats come back as they were."""
    return [(list(modules) if own is None else own, held) for own, held in json.loads(told)]


def _dump(said: object) -> bytes:
    # ASCII, so that a client's name is free to hold half of a surrogate pair.
    return json.dumps(said, separators=(",", ":")).encode("ascii")
