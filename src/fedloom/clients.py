"""One client's place in a run: which modules it trains, with which rank and scale, on which examples."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from transformers import PreTrainedModel

from fedloom import peft_bridge
from fedloom.adapters import AdapterSettings
from fedloom.config import ClientSettings, Config, LoraSettings
from fedloom.errors import ConfigError
from fedloom.lora import LoraState, narrow, stack
from fedloom.method import Method, State
from fedloom.patterns import Patterns
from fedloom.tokens import Prepared

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """One client: its adapter settings, its rank in every module that it trains, its examples in tokens."""

    adapter: AdapterSettings
    ranks: Mapping[str, int]
    data: Prepared


def adapter_settings(lora: LoraSettings) -> AdapterSettings:
    """[lora], or what one client has of it, as the adapter's settings."""
    return AdapterSettings(**lora.model_dump())


def shared_settings(base: PreTrainedModel, lora: LoraSettings, modules: Collection[str]) -> AdapterSettings:
    """[lora] as the server's adapter has it: on every module that some client trains."""
    settings = peft_bridge.resolve(base, adapter_settings(lora))
    if set(peft_bridge.targets(base, settings)) == set(modules):
        return settings
    return fitting(replace(settings, target_modules=sorted(modules)), modules)


def fitting(settings: AdapterSettings, modules: Collection[str]) -> AdapterSettings:
    """The settings without those patterns that none of the modules matches."""

    def kept(patterns: Mapping[str, Value], owner: str) -> dict[str, Value]:
        alone = {key: Patterns([key], owner) for key in patterns}
        return {k: v for k, v in patterns.items() if any(alone[k].key(name) is not None for name in modules)}

    return replace(
        settings,
        rank_pattern=kept(settings.rank_pattern, "rank_pattern"),
        alpha_pattern=kept(settings.alpha_pattern, "alpha_pattern"),
    )


def site(config: Config, base: PreTrainedModel, client: str, data: Prepared) -> Site:
    """One client; its adapter settings may differ from the others'.

    Patterns that it takes over from [lora] may name modules that it does not train; its own may not.
    """
    settings = adapter_settings(config.lora_of(client))
    own = config.clients.get(client, ClientSettings())
    bare = replace(settings, rank_pattern={}, alpha_pattern={})
    inherited = fitting(settings, peft_bridge.targets(base, bare)) if own.target_modules else settings
    settings = replace(
        settings,
        rank_pattern=inherited.rank_pattern if own.rank_pattern is None else settings.rank_pattern,
        alpha_pattern=inherited.alpha_pattern if own.alpha_pattern is None else settings.alpha_pattern,
    )
    settings = peft_bridge.resolve(base, settings)
    return Site(settings, peft_bridge.ranks(base, settings), data)


def apart(state: State, modules: Collection[str]) -> tuple[LoraState, LoraState]:
    """What a client trains, with an empty pair for every other module; and what its model has beside that."""
    others = LoraState({module: pair for module, pair in state.adapter.items() if module not in modules})
    empty = narrow(others, dict.fromkeys(others, 0))
    return LoraState({**state.adapter, **empty}), stack([state.fixed, others])


def top_ranks(method: Method, sites: Mapping[str, Site]) -> dict[str, int]:
    """The largest rank of each module among the clients that train it.

    Raises ConfigError if ranks or modules differ and the method forbids it.
    """
    top: dict[str, int] = {}
    for held in sites.values():
        for module, rank in held.ranks.items():
            top[module] = max(rank, top.get(module, 0))
    for client, held in sites.items():
        missing = sorted(set(top) - set(held.ranks))
        if missing and not method.module_subsets:
            raise ConfigError(
                f"method {method.name!r} needs every client to train the same modules, but client {client!r} does not "
                f"train {missing[0]}; set the same target_modules for all"
            )
        lower = sorted(module for module, rank in held.ranks.items() if rank < top[module])
        if lower and not method.facts.unequal_ranks:
            raise ConfigError(
                f"method {method.name!r} needs equal ranks, but client {client!r} has rank {held.ranks[lower[0]]} in "
                f"{lower[0]} where another has {top[lower[0]]}; set the same r and rank_pattern for all, or use one of "
                "the methods that `fedloom methods` lists with unequal ranks"
            )
    return top
