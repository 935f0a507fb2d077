"""What settings must say before a run may go across machines, and who is told which of them."""

from __future__ import annotations

import tomllib
from importlib.util import find_spec
from typing import Any

import tomli_w

from fedloom.errors import ConfigError
from fedloom.records.config import (
    Config,
    EvaluationSettings,
    FederationSettings,
    FlowerSettings,
    LocalSettings,
    OutputSettings,
    PrivacySettings,
)
from fedloom.records.configfile import parse

SERVERS_OWN = {
    "local": LocalSettings(),
    "flower": FlowerSettings(),
    "output": OutputSettings(),
    "evaluation": EvaluationSettings(),
}
"""Tables that the sites are not told: where the server is and how long it waits may change while a job lasts, and
scores are taken at the server."""
UNTOLD = {"local"}
"""Tables of another engine, which nobody is told: so a server of the release before takes the run too."""


SERVERS_RULES = ("eval_every", "mode", "buffer_size", "staleness_exponent", "max_staleness", "pace")
"""Keys of [federation] that the sites are not told: how the server takes updates together is nothing to them, and a
site of the release before takes part in asynchronous rounds too."""
SINCE: dict[str, int] = {
    **{f"federation.{key}": 2 for key in SERVERS_RULES if key != "eval_every"},
    "federation.regions": 2,
    "training.dp": 2,
    "wire.client_budget": 2,
    **{f"privacy.{key}": 2 for key in PrivacySettings.model_fields},
}
"""Keys of the sites' settings that the first protocol did not have ("training.max_steps", say), and the one that they
came with. At its default such a key means what a site without it does, and it is not told: then a site of the release
before takes the run, and a job goes on under a server that was updated meanwhile."""


def check_installed(extra: str, *libraries: str) -> None:
    """Raises ConfigError, which names the extra to install, where one of these libraries is missing."""
    for library in libraries:
        if find_spec(library) is None:
            raise ConfigError(f'this engine needs {library}, which is not installed: pip install "fedloom[{extra}]"')


def check_flower_settings(config: Config) -> None:
    """Raises ConfigError where the settings cannot be those of a federation across machines."""
    names, rules = config.federation.participants, config.flower
    if not names:
        raise ConfigError("federation.participants is missing: name the sites that take part, as their SITE.toml does")
    if len(set(names)) != len(names):
        raise ConfigError("federation.participants names a site twice")
    if rules.min_replies > len(names):
        raise ConfigError(
            f"flower.min_replies is {rules.min_replies}, but federation.participants names {len(names)} sites"
        )
    if config.federation.pace:
        raise ConfigError("federation.pace is for simulations: sites of a real federation have their own pace")
    if config.federation.regions is not None:
        raise ConfigError(
            "federation.regions is for simulations: across machines every site is asked by the one server; leave it out"
        )
    if config.federation.drop_out:
        raise ConfigError("federation.drop_out is for simulations: sites of a real federation drop out by themselves")


def shared_settings(config: Config) -> str:
    """The settings that the sites are told, as TOML.

    federation.eval_every may change while a job lasts, and a site holds a job to what it was told: it is not told.
    """
    usual = FederationSettings()
    federation = config.federation.model_copy(update={key: getattr(usual, key) for key in SERVERS_RULES})
    told = config.model_copy(update={**SERVERS_OWN, "federation": federation})
    return tomli_w.dumps(_without_defaults(told.model_dump(exclude_none=True, exclude=UNTOLD)))


def _without_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """The tables without keys of `SINCE` that have their default, and without a table of which none is left."""
    usual = Config().model_dump()
    left = {
        table: {
            key: value for key, value in held.items() if f"{table}.{key}" not in SINCE or value != usual[table][key]
        }
        for table, held in tree.items()
    }
    return {table: held for table, held in left.items() if held or not tree[table]}


def server_settings(config: Config) -> str:
    """The settings that the sites are not told, as TOML."""
    tables = dict.fromkeys(SERVERS_OWN.keys() - UNTOLD, True)
    own: dict[str, bool | set[str]] = {**tables, "federation": set(SERVERS_RULES)}
    return tomli_w.dumps(config.model_dump(include=own, exclude_none=True))


def join_settings(shared: str, own: str) -> Config:
    """The settings that were split into `shared_settings` and `server_settings`."""
    told, kept = tomllib.loads(shared), tomllib.loads(own)
    federation = {**told.get("federation", {}), **kept.get("federation", {})}
    return parse({**told, **kept, "federation": federation}, "the run's settings")
