"""A round played on made-up updates of true shapes: what it sends and what it costs the server.

No model and no data: the payloads are really encoded, the server really aggregates. Modules that are alike (the same
name and shape in every layer) are played once and counted as often as they occur.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedloom.compress.budget import Budget
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState, initial_state
from fedloom.methods.method import Method
from fedloom.records.config import Config
from fedloom.rounds.job import Job
from fedloom.rounds.turns import full_state, server_turn
from fedloom.studies.estimate.machine import extra_bytes
from fedloom.studies.estimate.made_up import Ranks, train_made_up, train_part
from fedloom.studies.estimate.play import Play
from fedloom.studies.estimate.sizes import CODINGS, PAPER, Sample, Sizes, efficiency, mean_sizes, scaled_bytes, sizes_of
from fedloom.studies.estimate.sums import count_messages, size_vector
from fedloom.wire import decode
from fedloom.workspace.clients import top_ranks
from fedloom.workspace.plan import downloads_of
from fedloom.workspace.privacy import plan_sums
from fedloom.workspace.regions import split_evenly

_TIGHT = 64
"""Bytes of a tensor in a payload below which the words around the tensors are no small part of it."""
ROUNDS = 3
"""Rounds played: the first is not typical (B = 0), and methods that alternate need two more."""


@dataclass(frozen=True, slots=True)
class Relayed:
    """Bytes between one region and the root in a round: what is said of each client, and the sum of its updates.

    first_sum: that of the first round.
    """

    each_client: float
    first_sum: float
    sum: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """A round of one method on the whole model.

    up, down: coding → bytes of one client's payload, the mean over clients and over the second and third round (methods
    may alternate, and begin otherwise than they go on); first: bytes of the first round, of all who attend, both
    ways, in `auto`. auto: the method's coding (`Method.form`). traffic: client that was played → its bytes in it.
    states: bytes of the full state after each round played; merges: whether it grows with every further one.
    replaces: how many of the newest broadcasts are enough for whoever missed more; 0 where all are needed. relay:
    between a region and the root. summed: whether updates come as a secure sum, whose messages beside the vectors
    `first` alone has.
    client_cpu_s: seconds of processor time of a client's turn beside its training, the mean of those that were played.
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
    replaces: int = 0
    relay: Relayed | None = None
    client_cpu_s: float = 0.0
    summed: bool = False


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one client's update and of one broadcast to it: of the first round, and the mean of later ones."""

    first_up: float
    first_down: float
    up: float
    down: float


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
    codings: Sequence[str] = CODINGS,
    course: Course | None = None,
    sums: Config | None = None,
) -> dict[str, Prediction | ConfigError]:
    """A round of each method with clients of these ranks (client → module → rank) on these modules, by name.

    One module of each kind is played, with `whole` every one. attending: clients of a round, all if None; those that
    are played have all ranks in turn. budget: wire.budget, for methods that keep to one. codings: forms in which
    payloads are coded beside the method's own; without any the papers' is left out too, which is quick. course: what a
    run does to a round. sums: see `Case`. A ConfigError stands for a method that cannot combine these ranks or modules.
    """
    asked = Asked(seed, attending, budget, tuple(codings), course or Course(), sums)
    played = {}
    for name, method in methods.items():
        tight = is_tight(method, layout, ranks, budget)
        # How large a share both sides know to travel follows from the bytes of the whole adapter.
        known = bool(sums and method.support)
        chosen = sample_modules(layout, ranks, whole=whole or tight or known)
        held = {
            client: {module: rank[module] for module in chosen.shapes if module in rank}
            for client, rank in ranks.items()
        }
        played[name] = _try(name, method, chosen, held, asked, joined=tight), chosen
    # Last, because measuring memory changes how memory is allocated from then on, and so how fast.
    return {
        name: told
        if isinstance(told, ConfigError)
        else replace(told[0], memory=measure_memory(told[1], chosen) if with_memory else None)
        for name, (told, chosen) in played.items()
    }


def is_tight(
    method: Method, layout: Mapping[str, tuple[int, int]], ranks: Mapping[str, Ranks], budget: Budget | None
) -> bool:
    """Whether payloads are so small that what they say of all tensors together counts: then one module stands for none.

    Such a method is played with every module, as it is.
    """
    if budget is None or not (method.joins and method.takes_budget):
        return False
    values = max(sum(rank * sum(layout[module]) for module, rank in held.items()) for held in ranks.values())
    return budget.bytes(values) < _TIGHT * 2 * len(layout)


@dataclass(frozen=True, slots=True)
class Course:
    """What a run does to a round. turns: how many a round has on the mean, num_rounds: how many rounds; 0: not known.

    regions: their number, 0 for none. fading: see `made_up.train_made_up`. steps: of a client in a round.
    """

    turns: float = 0
    num_rounds: int = 0
    regions: int = 0
    fading: bool = False
    steps: int = 10


@dataclass(frozen=True, slots=True)
class Asked:
    """What `predict` was asked for, but for methods, modules and ranks."""

    seed: int
    attending: int | None
    budget: Budget | None
    codings: tuple[str, ...]
    course: Course
    sums: Config | None = None


def _try(
    name: str, method: Method, chosen: Sample, held: Mapping[str, Ranks], asked: Asked, *, joined: bool
) -> tuple[Prediction, Play] | ConfigError:
    try:
        top = top_ranks(method, held)
        secure = plan_sums(asked.sums, method, held) if asked.sums else None
    except ConfigError as error:
        return error
    begin = initial_state(chosen.shapes, top, asked.seed)
    if method.on_base is not None:  # sizes do not depend on the values of the base weights
        method = method.on_base(method, begin, lambda module: torch.empty(chosen.shapes[module], device="meta"))
    here = choose_clients(held, asked.attending or len(held))
    kept = asked.budget if method.takes_budget else None
    scaled = replace(kept, size=round(kept.size / chosen.scale)) if kept else None
    turns = round(asked.course.turns) or len(here)
    job = Job(
        # Bytes of a sample are scaled up tensor by tensor; steps along directions are said once however many there are.
        replace(method, joins=bool(method.forward)),
        asked.seed,
        quantize("fp32"),
        budget=scaled,
        downloads=downloads_of(method, begin, held, turns, asked.course.num_rounds),
        weighting=asked.sums.federation.weighting if asked.sums else "examples",
        secure=secure,
    )
    return _predict(name, job, begin, here, chosen, method.form(kept), asked, joined)


def choose_clients(held: Mapping[str, Ranks], count: int) -> dict[str, Ranks]:
    """So many clients in the place of all: evenly from the smallest adapter to the largest."""
    order = sorted(held, key=lambda client: sum(held[client].values()))
    return {client: held[client] for client in (order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count))}


def _predict(
    name: str,
    job: Job,
    begin: LoraState,
    held: Mapping[str, Ranks],
    chosen: Sample,
    auto: str,
    asked: Asked,
    joined: bool,
) -> tuple[Prediction, Play]:
    """Three rounds in fp32, their payloads coded in every form, and in the method's own form where it matters.

    That is with a budget, since how much is sent follows from the form, with regions, whose sums do, and where no other
    form is asked for.
    """
    budget = job.method.budget(job.budget)
    own = None
    if auto != "fp32" and (budget or asked.course.regions or not asked.codings):
        method = replace(job.method, joins=joined or bool(job.method.forward))
        own = _play(replace(job, method=method, quantize=quantize(auto)), begin, held, chosen, auto, auto, asked)
    if own is None or asked.codings:
        seen = _play(job, begin, held, chosen, auto, "fp32", asked)
    if own is not None:
        seen = own if not asked.codings else _with_own(seen, own, auto)
    up, down = seen.up, seen.down
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
        sum(own.first_up + own.first_down for own in traffic.values()) + (count_messages(held) if job.secure else 0),
        auto,
        seen.efficiency,
        chosen.scale * sum(seen.play.server_cpu_s[1:]) / (ROUNDS - 1),
        traffic=traffic,
        states=seen.states,
        merges=job.method.merges,
        replaces=1 + job.method.alternates if job.method.replaces else 0,
        relay=relayed_bytes(seen.play, chosen),
        client_cpu_s=chosen.scale * sum(seen.play.client_cpu_s[len(held) :]) / (len(held) * (ROUNDS - 1)),
        summed=job.secure is not None,
    )
    return told, seen.play


def _with_own(seen: Played, own: Played, auto: str) -> Played:
    """What was played in fp32, with the sizes, states and sums of what was played in the method's own form."""
    for rounds, sizes_of_own in ((seen.up, own.up), (seen.down, own.down)):
        for every, sizes in zip(rounds, sizes_of_own, strict=True):
            for client, size in sizes.items():
                every[client] = {**every[client], auto: size[auto]}
    seen.play.sums, seen.play.said = own.play.sums, own.play.said
    return replace(seen, states=own.states)


@dataclass(frozen=True, eq=False, slots=True)
class Played:
    """Rounds that were played. up, down: client → sizes by coding, of every round; states: bytes of the full states.

    efficiency: of the last round.
    """

    play: Play
    up: list[dict[str, Sizes]]
    down: list[dict[str, Sizes]]
    states: tuple[float, ...]
    efficiency: float | None


def _play(
    job: Job, begin: LoraState, held: Mapping[str, Ranks], chosen: Sample, auto: str, made: str, asked: Asked
) -> Played:
    """Play three rounds, whose payloads have the form `made`; in another than fp32, they count in that one alone."""
    codings = asked.codings if made == "fp32" else ()
    names = list(held)
    count = min(asked.course.regions, len(names))
    regions = split_evenly(count, names) if count else None
    play, course = Play(job, begin, held, regions), asked.course
    train = train_made_up(job.method, fading=course.fading, steps=course.steps, run_seed=job.seed)
    steps = {client: train_part(train, own) for client, own in held.items()}
    up, down, states = [], [], []
    for number in range(1, ROUNDS + 1):
        vector = size_vector(job, play.server, number, chosen) if job.secure else None
        result = play.round(steps)
        if vector is None:
            up.append(sizes_of(result.uploads, chosen, auto, codings, made))
        else:
            up.append({client: dict.fromkeys((*codings, PAPER, auto), vector) for client in held})
        received = {client: play.broadcast_for(client, result.broadcast) for client in play.clients}
        down.append(sizes_of(received, chosen, auto, codings, made))
        states.append(chosen.scale * len(full_state(job, play.server, number)))
    play.clients.clear()
    entries = decode(result.broadcast).entries
    return Played(play, up, down, tuple(states), efficiency(entries, chosen))


def relayed_bytes(play: Play, chosen: Sample) -> Relayed | None:
    """What regions and root said to each other in the rounds that were played; None without regions."""
    if not play.regions:
        return None
    sizes = [[scaled_bytes(payload, chosen) for payload in sums.values()] for sums in play.sums]
    # Sums are told of as well; what is left is said of clients.
    told = sum(play.said) - sum(len(payload) for sums in play.sums for payload in sums.values())
    turns = ROUNDS * sum(map(len, play.regions.values()))
    later = [size for found in sizes[1:] for size in found]
    return Relayed(told / turns, sum(sizes[0]) / len(sizes[0]), sum(later) / len(later))


def measure_memory(play: Play, chosen: Sample) -> float | None:
    """Peak of the last server turn above what was held before, scaled to the model, and the payloads that it reads."""
    peak = extra_bytes(lambda: server_turn(play.job, play.before, play.uploads, ROUNDS))
    held = sum(map(len, play.uploads.values()))
    return None if peak is None else chosen.scale * (peak + held)


def equal_ranks(layout: Mapping[str, tuple[int, int]], ranks: Sequence[int]) -> dict[str, dict[str, int]]:
    """Client → module → rank for clients that have one rank in all modules."""
    return {f"client-{number}": dict.fromkeys(layout, rank) for number, rank in enumerate(ranks, 1)}
