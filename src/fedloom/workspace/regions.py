"""Who belongs to which region of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches

from fedloom.errors import ConfigError
from fedloom.methods.method import Method
from fedloom.methods.table import METHODS, build
from fedloom.rounds.regions import cannot_add

Regions = Mapping[str, Sequence[str]]
"""Region → its clients."""


def plan_regions(
    setting: int | Mapping[str, Sequence[str]] | None, clients: Collection[str], method: Method
) -> Regions | None:
    """The regions that federation.regions asks for; None where it asks for none.

    Raises ConfigError where the regions do not have every client once, or the method's updates do not add.
    """
    if setting is None:
        return None
    if method.adds is None:
        raise cannot_add(method, sorted(name for name in METHODS if build(name).adds))
    regions = split_evenly(setting, sorted(clients)) if isinstance(setting, int) else setting
    _check_members(regions, clients)
    return regions


def split_evenly(number: int, clients: Sequence[str]) -> dict[str, Sequence[str]]:
    """So many regions of neighbours in the list, as equal as can be. Raises ConfigError for more than clients."""
    if number > len(clients):
        raise ConfigError(
            f"federation.regions is {number}, but there are {len(clients)} clients: each needs one at least"
        )
    edges = [place * len(clients) // number for place in range(number + 1)]
    width = len(str(number))
    return {f"region-{place + 1:0{width}d}": clients[edges[place] : edges[place + 1]] for place in range(number)}


def _check_members(regions: Regions, clients: Collection[str]) -> None:
    named = Counter(client for members in regions.values() for client in members)
    for client, times in named.items():
        if client not in clients:
            near = get_close_matches(client, clients, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(clients)[:9])}"
            raise ConfigError(f"federation.regions names {client!r}, which is no client of this run; {hint}")
        if times > 1:
            raise ConfigError(f"federation.regions names {client!r} {times} times: a client belongs to one region")
    left = sorted(set(clients) - set(named))
    if left:
        raise ConfigError(f"federation.regions has no region for {', '.join(left[:9])}: every client needs one")
