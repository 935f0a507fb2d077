"""Regional servers of a simulation, and the record of what travels between them and the root."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedloom.records.rows import Direction, Relay
from fedloom.rounds.regions import Tree
from fedloom.wire import read_header
from fedloom.workspace.regions import Regions

if TYPE_CHECKING:
    from fedloom.server.loop import Rounds


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
