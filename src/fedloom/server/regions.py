"""Regional servers of a simulation: who belongs to which, and the record of what travels between them and the root."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from fedloom.errors import ConfigError
from fedloom.methods.method import Method
from fedloom.methods.table import METHODS, build
from fedloom.records.rows import Direction, Relay
from fedloom.rounds.regions import Tree, cannot_add
from fedloom.wire import read_header

if TYPE_CHECKING:
    from fedloom.server.loop import Rounds

Regions = Mapping[str, Sequence[str]]


class RegionalServers:
    """The regions of a run in progress.

    A region keeps nothing from one round to the next: what its clients are sent in a round comes from the root once,
    and each of them is handed the same bytes.
    """

    def __init__(self, regions: Regions) -> None:
        self.regions = regions
        self._region = {client: region for region, clients in regions.items() for client in clients}
        self._held: set[tuple[str, bytes]] = set()  # (region, payload) of this round
        self._now = (0, False)

    def tree(self, rounds: Rounds) -> Tree:
        """The tree for the server's turn of this round, which records what travels."""

        def tell(region: str, direction: Direction, kind: str, size: int) -> None:
            rounds.folder.ledger.append(Relay(rounds.round, region, direction, kind, size))

        return Tree(self.regions, tell)

    def bring(self, rounds: Rounds, client: str, payloads: Sequence[bytes], *, delivery: bool) -> None:
        """Record what the client's region is sent, so that it can hand these payloads to the client."""
        if self._now != (rounds.round, delivery):
            self._now, self._held = (rounds.round, delivery), set()
        region = self._region[client]
        for payload in payloads:
            # A payload ends with its checksum, which names it within a round.
            held = (region, bytes(payload[-8:]))
            if held not in self._held:
                self._held.add(held)
                kind = read_header(payload).kind
                rounds.folder.ledger.append(Relay(rounds.round, region, "down", kind, len(payload), delivery))


def plan_regions(
    setting: int | Mapping[str, Sequence[str]] | None, clients: Collection[str], method: Method
) -> RegionalServers | None:
    """The regional servers that federation.regions asks for; None where it asks for none.

    Raises ConfigError where the regions do not have every client once, or the method's updates do not add.
    """
    if setting is None:
        return None
    if method.adds is None:
        raise cannot_add(method, sorted(name for name in METHODS if build(name).adds))
    regions = split_evenly(setting, sorted(clients)) if isinstance(setting, int) else setting
    _check_members(regions, clients)
    return RegionalServers(regions)


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
