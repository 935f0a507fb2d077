"""What settings must say before a run may go across machines."""

from __future__ import annotations

from fedloom.config import Config
from fedloom.errors import ConfigError


def check(config: Config) -> None:
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
    if config.federation.drop_out:
        raise ConfigError("federation.drop_out is for simulations: sites of a real federation drop out by themselves")
