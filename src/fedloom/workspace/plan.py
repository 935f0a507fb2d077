"""What follows from a run's settings and its base model's modules: the job, and where everybody's adapter sits."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedloom.adapters.base_identity import check_same_base
from fedloom.adapters.folder import load_adapter
from fedloom.compress.budget import Budget
from fedloom.compress.quantize import quantize
from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError, ModelError
from fedloom.lora.pair import LoraState, initial_state
from fedloom.methods.method import Method
from fedloom.methods.table import buffered_names, build
from fedloom.model.identity import weights_digest
from fedloom.model.placement import Adapter, LinearModule, place_adapter
from fedloom.records.config import Config, FederationSettings
from fedloom.records.quantities import parse_budget
from fedloom.rounds.caps import Caps
from fedloom.rounds.consolidation import Consolidation
from fedloom.rounds.job import Job, Robust, group_alike
from fedloom.rounds.least import check_room
from fedloom.rounds.rules import LEAST
from fedloom.workspace.clients import place_client, place_shared, top_ranks
from fedloom.workspace.privacy import plan_sums
from fedloom.workspace.regions import plan_regions


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """What follows from the settings and the base model's modules alone: `shared` is the server's adapter."""

    job: Job
    initial: LoraState
    shared: Adapter
    adapters: Mapping[str, Adapter]

    def on_base(self, read: Callable[[str], Tensor]) -> Plan:
        """The same with what the method takes from the base weights; read: module → W0 (m × n)."""
        method = self.job.method
        if method.on_base is None:
            return self
        return replace(self, job=replace(self.job, method=method.on_base(method, self.initial, read)))


def choose_method(config: Config, method: Method | None) -> Method:
    """The method given, or the one that the settings name. Raises ConfigError where it does not go with others."""
    method = method or build(config.method.name, config.method.settings)
    check_method_takes(method, config)
    return method


def plan_job(linear: Mapping[str, LinearModule], config: Config, clients: Collection[str], method: Method) -> Plan:
    """Where everybody's adapter sits, and the job: arithmetic on dictionaries, after one walk of the model."""
    common = place_adapter(linear, config.lora)
    adapters = {name: place_client(linear, config, name) if name in config.clients else common for name in clients}
    client_ranks = {name: adapter.ranks for name, adapter in adapters.items()}
    ranks = top_ranks(method, client_ranks)
    shared = place_shared(linear, common, ranks)
    initial = first_adapter(config, shared.shapes, ranks)
    federation = config.federation
    check_buffer(federation, clients)
    plan_regions(federation.regions, clients, method)  # so that a run that cannot be is refused before any training
    if federation.regions is not None and federation.mode == "buffered":
        raise ConfigError(
            "federation.regions sums a round's updates, and with federation.mode = 'buffered' each comes by itself: "
            "leave one of them out"
        )
    budget = Budget(*parse_budget(config.wire.budget)) if config.wire.budget else None
    job = Job(
        method=method,
        seed=federation.seed,
        quantize=quantize(method.form(budget) if config.wire.values == "auto" else config.wire.values),
        weighting=federation.weighting,
        budget=budget,
        module_weighting=federation.module_weighting,
        consolidation=Consolidation(federation.consolidate_every, federation.consolidate_energy),
        num_rounds=federation.num_rounds,
        downloads=downloads_of(
            method, initial, client_ranks, turns_per_round(federation, len(clients)), federation.num_rounds
        ),
        start=initial if method.needs_start else LoraState(),
        caps=caps_of(federation, clients),
        robust=robust_of(config, clients),
        ranks=client_ranks,
        secure=plan_sums(config, method, client_ranks),
    )
    check_room(job, initial, client_ranks)
    return Plan(job, initial, shared, adapters)


def check_method_takes(method: Method, config: Config) -> None:
    """Raises ConfigError for a setting outside [method] that does nothing with this method."""
    if config.wire.budget and not method.takes_budget:
        raise ConfigError(
            f"wire.budget does not work with method {method.name!r}, which always sends all that it trains; unset it"
        )
    if config.wire.values != "auto" and method.own_values:
        raise ConfigError(
            f"wire.values is {config.wire.values!r}, but method {method.name!r} with these settings chooses itself how "
            "it rounds values: unset it"
        )
    trainings = [config.training, *(config.training_of(client) for client in config.clients)]
    if method.forward and any(training.dp or training.gradient_checkpointing for training in trainings):
        key = "dp" if any(training.dp for training in trainings) else "gradient_checkpointing"
        raise ConfigError(
            f"training.{key} is about gradients, and method {method.name!r} trains by forward passes alone, which take "
            "none: unset it"
        )
    if config.federation.consolidate_every and not method.merges:
        raise ConfigError(
            f"federation.consolidate_every does nothing with method {method.name!r}, which merges nothing; unset it"
        )
    if config.federation.mode == "buffered" and not method.updates:
        raise ConfigError(
            f"federation.mode is 'buffered', but what clients of method {method.name!r} send means something beside "
            f"updates of the same version alone: use one of {', '.join(buffered_names())}, or synchronous rounds"
        )


def check_buffer(federation: FederationSettings, clients: Collection[str]) -> None:
    """Raises ConfigError where asynchronous rounds ask for more updates than there are clients, or name nobody."""
    if federation.buffer_size and federation.buffer_size > len(clients):
        raise ConfigError(
            f"federation.buffer_size is {federation.buffer_size}, but there are {len(clients)} clients, each with one "
            "update in a step at most"
        )
    for name in federation.pace:
        if name not in clients:
            raise ConfigError(
                f"federation.pace has a number for {name!r}, which takes no part; there are "
                f"{', '.join(sorted(clients)[:9])}"
            )


def turns_per_round(federation: FederationSettings, clients: int) -> int:
    """How many turns so many clients have in a round, on the mean."""
    buffered = federation.mode == "buffered"
    return federation.updates_per_step(clients) if buffered else federation.clients_per_round(clients)


def caps_of(federation: FederationSettings, clients: Collection[str]) -> Caps:
    """What one client may count for. Raises ConfigError where federation.client_examples is about nobody."""
    for name in federation.client_examples:
        if name not in clients:
            raise ConfigError(
                f"federation.client_examples has a number for {name!r}, which takes no part; there are "
                f"{', '.join(sorted(clients)[:9])}"
            )
    return Caps(
        federation.max_share,
        federation.client_examples,
        federation.max_norm,
        federation.max_norm_ratio,
        federation.max_examples or math.inf,
    )


def robust_of(config: Config, clients: Collection[str]) -> Robust:
    """How a round withstands liars. Raises ConfigError, which says why, where the rule cannot hold or cannot see."""
    federation = config.federation
    robust = Robust(
        federation.robust,
        federation.num_malicious_clients,
        federation.clip_ratio,
        federation.public is not None,
        federation.public_tolerance,
    )
    set_key = "public" if federation.public else "robust" if federation.robust != "none" else ""
    if set_key and config.privacy.secure_aggregation:
        raise ConfigError(
            f"federation.{set_key} looks at every client's update, and with privacy.secure_aggregation the server has "
            "their sum alone: leave one of them out. What bounds a liar under the sum is privacy.clip, "
            "privacy.most_examples and the rules of each site"
        )
    if set_key and federation.regions is not None:
        raise ConfigError(
            f"federation.{set_key} looks at every client's update, and with federation.regions the root has its "
            "regions' sums alone: leave one of them out"
        )
    if federation.robust in LEAST:
        turns = turns_per_round(federation, len(clients))
        faults, (a, b) = robust.faults(turns), LEAST[federation.robust]
        if clients and turns < a * faults + b:
            raise ConfigError(
                f"federation.robust is {federation.robust!r}: to withstand {faults} of the clients of a round it needs "
                f"{a * faults + b} of them, and a round has {turns}. Use federation.robust = 'clip' with "
                "federation.public, which need no majority"
            )
    return robust


def describe_excess(adapter: Adapter) -> str:
    """That ranks are above what some modules can have, in words; empty where none is."""
    shapes = adapter.shapes
    over = [module for module, rank in adapter.ranks.items() if rank > min(shapes[module])]
    if not over:
        return ""
    m, n = shapes[over[0]]
    return (
        f"lora.r is {adapter.ranks[over[0]]} in {over[0]}, which is {m} × {n} and has rank {min(m, n)} at most"
        f"{f', and too large in {len(over) - 1} more modules' if over[1:] else ''}: what is beyond it costs bytes only"
    )


def count_values(adapter: LoraState, ranks: Mapping[str, int]) -> int:
    """How many values a client of these ranks holds."""
    return sum(rank * sum(adapter[module].shape) for module, rank in ranks.items())


def count_all_values(adapter: LoraState, client_ranks: Mapping[str, Mapping[str, int]]) -> int:
    """How many values all clients hold together."""
    return sum(count * count_values(adapter, ranks) for _, ranks, count in group_alike(client_ranks))


def downloads_of(
    method: Method, adapter: LoraState, client_ranks: Mapping[str, Mapping[str, int]], asked: int, num_rounds: int
) -> float:
    """Values that go down in a turn, over the values that a client holds (see `download_share`).

    num_rounds: 0 where it is not known. Where the newest broadcast is enough, a turn has one, and the result besides.
    """
    if method.replaces:
        each = len(client_ranks) / count_all_values(adapter, client_ranks)
        return adapter.numel() * each * (1.0 + (len(client_ranks) / (asked * num_rounds) if num_rounds else 0.0))
    return download_share(adapter, client_ranks, asked)


def download_share(adapter: LoraState, client_ranks: Mapping[str, Mapping[str, int]], asked: int) -> float:
    """Values that go down in a turn, where everything is sent that was missed, over the values that a client holds.

    adapter: the server's. client_ranks: client → module → rank. asked: clients in a round.
    """
    # Of K clients, `asked` turn in each round, so one turns every K / asked rounds and receives as many broadcasts,
    # each of all the server's values. A client holds held / K values on the mean. So the share is
    # (values · K / asked) / (held / K) = values · K² / (held · asked).
    held = count_all_values(adapter, client_ranks)
    return adapter.numel() * len(client_ranks) ** 2 / (held * asked) if held else 1.0


def first_adapter(config: Config, shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> LoraState:
    """The seeded start, or the adapter that model.adapter names. Raises ModelError if that is for another model."""
    if config.model.adapter is None:
        return initial_state(shapes, ranks, derived_seed(config.federation.seed, "start"))
    state, folder = load_adapter(config.model.adapter)
    if not config.model.any_base:
        here = weights_digest(config.model.path)
        check_same_base([folder], here, config.model.path, "model.any_base = true")
    for module in sorted({*shapes, *state}):
        wanted = (shapes[module], ranks[module]) if module in shapes else None
        found = (state[module].shape, state[module].rank) if module in state else None
        if wanted != found:
            raise ModelError(
                f"{folder.folder} does not fit {config.model.path}: module {module} has (shape, rank) {found} in the "
                f"adapter and {wanted} in the run; it is for another base model, or [lora] differs"
            )
    return state
