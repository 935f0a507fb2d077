"""Who takes part in a run: the clients that have data and are asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

from fedloom.errors import ConfigError
from fedloom.model.examples import Example


def select_participants(texts: dict[str, list[Example]], wanted: Sequence[str] | None) -> dict[str, list[Example]]:
    """The clients that federation.participants names, or all. Raises ConfigError for a name without data."""
    unknown = sorted(set(wanted or ()) - set(texts))
    if unknown:
        raise ConfigError(
            f"federation.participants names {unknown[0]!r}, which has no data; there are {', '.join(sorted(texts))}"
        )
    return {client: examples for client, examples in texts.items() if wanted is None or client in wanted}


def check_clients_exist(
    settings: Collection[str], clients: Collection[str], what: str = "[clients.{name}] has settings"
) -> None:
    """Raises ConfigError where [clients.<name>], or `what` else goes by name, is about a client that there is not."""
    for name in settings:
        if name not in clients:
            near = get_close_matches(name, clients, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(clients)[:9])}"
            raise ConfigError(f"{what.format(name=name)} for a client without data; {hint}")
