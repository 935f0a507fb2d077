"""A round played on made-up updates of true shapes: what it sends and what it costs the server.

No model and no data: the payloads are really encoded, the server really aggregates. Modules that are alike (the same
name and shape in every layer) are played once and counted as often as they occur.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedloom.compress.budget import Budget
from fedloom.compress.entries import Dense, Entry, floats
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState, initial_state
from fedloom.methods.method import Method
from fedloom.rounds.federation import Federation
from fedloom.rounds.job import Job
from fedloom.rounds.turns import ServerTurn, full_state, server_turn
from fedloom.studies.estimate.machine import extra_bytes
from fedloom.studies.estimate.made_up import Ranks, train_made_up, train_part
from fedloom.studies.estimate.paper import paper_encode
from fedloom.wire import Message, decode, describe, encode
from fedloom.workspace.clients import top_ranks
from fedloom.workspace.plan import downloads_of

CODINGS = ("fp32", "bf16", "int8", "int4")
PAPER = "paper"
"""The coding of the papers: float32 values, and for sparse tensors a bitmap of all elements."""
ROUNDS = 3
"""Rounds played: the first is not typical (B = 0), and methods that alternate need two more."""
Sizes = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Sample:
    """One module of each kind, and how often each occurs in the model."""

    shapes: Mapping[str, tuple[int, int]]
    counts: Mapping[str, int]

    @property
    def scale(self) -> float:
        """Adapter values of the model over those of the sample, at equal ranks."""
        whole = sum(self.counts[name] * (m + n) for name, (m, n) in self.shapes.items())
        return whole / sum(m + n for m, n in self.shapes.values())


@dataclass(frozen=True, slots=True)
class Prediction:
    """A round of one method on the whole model.

    up, down: coding → bytes of one client's payload, the mean over clients and over the second and third round (methods
    may alternate, and begin otherwise than they go on); first: bytes of the first round, of all who attend, both
    ways, in `auto`. auto: the method's coding (`Method.form`). traffic: client that was played → its bytes in it.
    states: bytes of the full state after each round played; merges: whether it grows with every further one.
    replaces: whether the newest broadcast is enough for whoever missed some.
    efficiency: one over the sum of the ranks that are broadcast, a missing factor counting half; None where the
    broadcast is sparse or has no factors. server_cpu_s: seconds of processor time of the server's turn, the sum over
    threads; memory: bytes that it needs beside its state, payloads included (None where the system does not tell).
    """

    method: str
    up: Sizes
    down: Sizes
    first: float
    auto: str
    efficiency: float | None
    server_cpu_s: float
    memory: float | None = None
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    states: tuple[float, ...] = ()
    merges: bool = False
    replaces: bool = False


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one client's update and of one broadcast to it: of the first round, and the mean of later ones."""

    first_up: float
    first_down: float
    up: float
    down: float


class Play(Federation):
    """A federation of a few modules in progress; it remembers its last round, and what the server took in each."""

    def __init__(self, job: Job, adapter: LoraState, clients: Mapping[str, Ranks]) -> None:
        super().__init__(job, adapter, clients)
        self.server_cpu_s: list[float] = []
        self.uploads: Mapping[str, bytes] = {}
        self.before = self.server

    def server_turn(self, uploads: Mapping[str, bytes]) -> ServerTurn:
        """The server's turn, timed."""
        self.uploads, self.before = uploads, self.server
        began = time.process_time()  # the clock on the wall would count whatever else the machine does
        turn = super().server_turn(uploads)
        self.server_cpu_s.append(time.process_time() - began)
        return turn


def sample_modules(layout: Mapping[str, tuple[int, int]], ranks: Mapping[str, Ranks], *, whole: bool = False) -> Sample:
    """One module of each kind: of those that share the last part of the name, the shape and every client's rank.

    With `whole` every module.
    """
    kinds: dict[object, str] = {}
    counts: Counter[str] = Counter()
    for module, shape in layout.items():
        key = module if whole else module.rpartition(".")[2], shape, tuple(held.get(module) for held in ranks.values())
        counts[kinds.setdefault(key, module)] += 1
    return Sample({module: layout[module] for module in counts}, counts)


def predict(
    methods: Mapping[str, Method],
    layout: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, Ranks],
    *,
    seed: int = 0,
    whole: bool = False,
    with_memory: bool = True,
    attending: int | None = None,
    budget: Budget | None = None,
) -> dict[str, Prediction | ConfigError]:
    """A round of each method with clients of these ranks (client → module → rank) on these modules, by name.

    One module of each kind is played, with `whole` every one. attending: clients of a round, all if None; those that
    are played have all ranks in turn. budget: wire.budget, for methods that keep to one. A ConfigError stands for a
    method that cannot combine these ranks or modules.
    """
    chosen = sample_modules(layout, ranks, whole=whole)
    held = {
        client: {module: rank[module] for module in chosen.shapes if module in rank} for client, rank in ranks.items()
    }
    played = {name: _try(name, method, chosen, held, seed, attending, budget) for name, method in methods.items()}
    # Last, because measuring memory changes how memory is allocated from then on, and so how fast.
    return {
        name: told
        if isinstance(told, ConfigError)
        else replace(told[0], memory=measure_memory(told[1], chosen) if with_memory else None)
        for name, told in played.items()
    }


def _try(
    name: str,
    method: Method,
    chosen: Sample,
    held: Mapping[str, Ranks],
    seed: int,
    attending: int | None,
    budget: Budget | None,
) -> tuple[Prediction, Play] | ConfigError:
    try:
        top = top_ranks(method, held)
    except ConfigError as error:
        return error
    begin = initial_state(chosen.shapes, top, seed)
    if method.on_base is not None:  # sizes do not depend on the values of the base weights
        method = method.on_base(method, begin, lambda module: torch.empty(chosen.shapes[module], device="meta"))
    here = choose_clients(held, attending or len(held))
    kept = budget if method.takes_budget else None
    scaled = replace(kept, size=round(kept.size / chosen.scale)) if kept else None
    job = Job(
        replace(method, joins=False),  # bytes of a sample are scaled up tensor by tensor
        seed,
        quantize("fp32"),
        budget=scaled,
        downloads=downloads_of(method, begin, held, len(here), 0),
    )
    return _predict(name, job, begin, here, chosen, method.form(kept))


def choose_clients(held: Mapping[str, Ranks], count: int) -> dict[str, Ranks]:
    """So many clients in the place of all: evenly from the smallest adapter to the largest."""
    order = sorted(held, key=lambda client: sum(held[client].values()))
    return {client: held[client] for client in (order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count))}


def _predict(
    name: str, job: Job, begin: LoraState, held: Mapping[str, Ranks], chosen: Sample, auto: str
) -> tuple[Prediction, Play]:
    """Three rounds in fp32, their payloads coded in every form; for a method with a budget, in its own form as well."""
    play, up, down, states, efficient = _play(job, begin, held, chosen, auto)
    if job.method.budget(job.budget) and auto != "fp32":  # how much is sent follows from the form
        _, up_auto, down_auto, states, _ = _play(replace(job, quantize=quantize(auto)), begin, held, chosen, auto)
        for rounds, own in ((up, up_auto), (down, down_auto)):
            for every, sizes in zip(rounds, own, strict=True):
                for client, size in sizes.items():
                    every[client] = {**every[client], auto: size[auto]}
    traffic = {
        client: Traffic(
            up[0][client][auto],
            down[0][client][auto],
            sum(sizes[client][auto] for sizes in up[1:]) / (ROUNDS - 1),
            sum(sizes[client][auto] for sizes in down[1:]) / (ROUNDS - 1),
        )
        for client in held
    }
    told = Prediction(
        name,
        mean_sizes([size for sizes in up[1:] for size in sizes.values()]),
        mean_sizes([size for sizes in down[1:] for size in sizes.values()]),
        sum(own.first_up + own.first_down for own in traffic.values()),
        auto,
        efficient,
        chosen.scale * sum(play.server_cpu_s[1:]) / (ROUNDS - 1),
        traffic=traffic,
        states=states,
        merges=job.method.merges,
        replaces=bool(job.method.replaces),
    )
    return told, play


def _play(
    job: Job, begin: LoraState, held: Mapping[str, Ranks], chosen: Sample, auto: str
) -> tuple[Play, list[dict[str, Sizes]], list[dict[str, Sizes]], tuple[float, ...], float | None]:
    """(the play, client → sizes up and down of every round, bytes of the full states, efficiency of the last round)."""
    play, train = Play(job, begin, held), train_made_up(job.method)
    steps = {client: train_part(train, own) for client, own in held.items()}
    up, down, states = [], [], []
    for number in range(1, ROUNDS + 1):
        result = play.round(steps)
        up.append(sizes_of(result.uploads, chosen, auto))
        received = {client: play.broadcast_for(client, result.broadcast) for client in play.clients}
        down.append(sizes_of(received, chosen, auto))
        states.append(chosen.scale * len(full_state(job, play.server, number)))
    play.clients.clear()
    return play, up, down, tuple(states), efficiency(decode(result.broadcast).entries, chosen)


def sizes_of(payloads: Mapping[str, bytes], chosen: Sample, auto: str) -> dict[str, Sizes]:
    """Client → coding → bytes of its payload on the whole model; payloads that are alike are coded once."""
    codings = dict.fromkeys((*CODINGS, auto))
    known: dict[object, dict[str, float]] = {}
    found: dict[str, Sizes] = {}
    for client, message in ((client, decode(payload)) for client, payload in payloads.items()):
        alike = tuple((name, entry.shape, type(entry)) for name, entry in message.entries.items())
        if alike not in known:
            known[alike] = {coding: scaled_bytes(recode(message, coding), chosen) for coding in codings}
            known[alike][PAPER] = paper_bytes(message.entries, chosen)
        found[client] = known[alike]
    return found


def mean_sizes(sizes: Sequence[Sizes]) -> dict[str, float]:
    """The mean of each coding."""
    return {coding: sum(size[coding] for size in sizes) / len(sizes) for coding in sizes[0]}


def recode(message: Message, coding: str) -> bytes:
    """The same message with its values in another form."""
    entries = {
        name: replace(entry, values=quantize(coding)(floats(entry.values), seed))
        for seed, (name, entry) in enumerate(message.entries.items())
    }
    return encode(Message(message.header, entries))


def scaled_bytes(payload: bytes, chosen: Sample) -> float:
    """Bytes of a payload if every module were in it as often as in the model."""
    told = describe(payload)
    index = told.parts["index"] / max(len(told.tensors), 1)
    tensors = sum(
        occurrences(tensor.name, chosen) * (tensor.position_bytes + tensor.value_bytes + index)
        for tensor in told.tensors
    )
    return told.parts["header"] + told.parts["checksum"] + tensors


def paper_bytes(entries: Mapping[str, Entry], chosen: Sample) -> float:
    """The same in the papers' coding."""
    return sum(
        occurrences(name, chosen)
        * (4 * entry.values.numel() if isinstance(entry, Dense) else len(paper_encode({name: entry})))
        for name, entry in entries.items()
    )


def occurrences(name: str, chosen: Sample) -> int:
    """How often the module of a tensor is in the model."""
    return chosen.counts[name.rpartition("/")[0]]


def efficiency(entries: Mapping[str, Entry], chosen: Sample) -> float | None:
    """One over the sum of broadcast ranks; each factor counts half."""
    if any(not isinstance(entry, Dense) or name.endswith("/R") for name, entry in entries.items()):
        return None
    ranks = sum(
        occurrences(name, chosen) * (entry.shape[0] if name.endswith("A") else entry.shape[-1]) / 2
        for name, entry in entries.items()
    )
    return 1 / ranks if ranks else None


def measure_memory(play: Play, chosen: Sample) -> float | None:
    """Peak of the last server turn above what was held before, scaled to the model, and the payloads that it reads."""
    peak = extra_bytes(lambda: server_turn(play.job, play.before, play.uploads, ROUNDS))
    held = sum(map(len, play.uploads.values()))
    return None if peak is None else chosen.scale * (peak + held)


def equal_ranks(layout: Mapping[str, tuple[int, int]], ranks: Sequence[int]) -> dict[str, dict[str, int]]:
    """Client → module → rank for clients that have one rank in all modules."""
    return {f"client-{number}": dict.fromkeys(layout, rank) for number, rank in enumerate(ranks, 1)}
