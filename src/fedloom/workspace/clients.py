"""One client's place in a run: which modules it trains, with which rank and scale, on which examples."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState, narrow, stack
from fedloom.methods.method import Method, State
from fedloom.model.placement import (
    Adapter,
    LinearModule,
    keep_fitting_patterns,
    pattern_key,
    place_adapter,
    target_names,
)
from fedloom.model.tokens import TokenizedExamples
from fedloom.records.config import ClientSettings, Config
from fedloom.rounds.job import find_tops, group_alike


@dataclass(frozen=True, eq=False, slots=True)
class LocalClient:
    """One client: its adapter, and its examples in tokens."""

    adapter: Adapter
    data: TokenizedExamples

    @property
    def ranks(self) -> Mapping[str, int]:
        """Its rank in every module that it trains."""
        return self.adapter.ranks


def place_client(linear: Mapping[str, LinearModule], config: Config, client: str) -> Adapter:
    """One client's adapter: [lora] with what [clients.<name>] sets over it.

    Patterns that it takes over from [lora] may name modules that it does not train; its own may not.
    """
    lora, own = config.lora_of(client), config.clients.get(client, ClientSettings())
    if own.target_modules is not None or own.target_parameters is not None:
        fitting = keep_fitting_patterns(lora, [pattern_key(name, linear) for name in target_names(linear, lora)])
        inherited = {key for key in ("rank_pattern", "alpha_pattern") if getattr(own, key) is None}
        lora = lora.model_copy(update={key: getattr(fitting, key) for key in inherited})
    return place_adapter(linear, lora)


def place_shared(linear: Mapping[str, LinearModule], common: Adapter, modules: Collection[str]) -> Adapter:
    """The server's adapter: [lora] on every module that some client trains. `common` is [lora] as it stands."""
    if common.modules.keys() == set(modules):
        return common
    keys = {pattern_key(name, linear) for name in modules}
    named = {linear[name].parameter for name in modules} - {""}
    places = {"target_modules": tuple(sorted(keys - named)), "target_parameters": tuple(sorted(named))}
    return place_adapter(linear, keep_fitting_patterns(common.lora.model_copy(update=places), keys))


def split_trained(state: State, modules: Collection[str]) -> tuple[LoraState, LoraState]:
    """(what a client trains, with an empty pair for every other module; what its model has besides)."""
    others = LoraState({module: pair for module, pair in state.adapter.items() if module not in modules})
    empty = narrow(others, dict.fromkeys(others, 0))
    return LoraState({**state.adapter, **empty}), stack([state.fixed, others])


def top_ranks(method: Method, ranks: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The largest rank of each module among the clients that train it; `ranks` is client → module → rank.

    Raises ConfigError if ranks or modules differ and the method forbids it.
    """
    top = find_tops(ranks)
    for client, held, _ in group_alike(ranks):
        missing = sorted(set(top) - set(held))
        if missing and not method.module_subsets:
            raise ConfigError(
                f"method {method.name!r} needs every client to train the same modules, but client {client!r} does not "
                f"train {missing[0]}; set the same target_modules for all"
            )
        lower = sorted(module for module, rank in held.items() if rank < top[module])
        if lower and not method.facts.unequal_ranks:
            raise ConfigError(
                f"method {method.name!r} needs equal ranks, but client {client!r} has rank {held[lower[0]]} in "
                f"{lower[0]} where another has {top[lower[0]]}; set the same r and rank_pattern for all, or use one of "
                "the methods that `fedloom methods` lists with unequal ranks"
            )
    return top
