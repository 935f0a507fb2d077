"""A federation of a few modules that is played on made-up updates, with what everybody took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from fedloom.lora.pair import LoraState
from fedloom.methods.method import State
from fedloom.rounds.cohort import Cohort
from fedloom.rounds.federation import Federation
from fedloom.rounds.job import Job
from fedloom.rounds.regions import Tree
from fedloom.rounds.step import Train, Trained
from fedloom.rounds.turns import ServerTurn, server_turn
from fedloom.studies.estimate.made_up import Ranks


class Play(Federation):
    """A federation of a few modules in progress; it remembers its last round, and what everybody took in each.

    regions: whose servers sum the updates, if any. said, sums: of each round, bytes about clients between regions and
    root, and the payloads of the regions.
    """

    def __init__(
        self,
        job: Job,
        adapter: LoraState,
        clients: Mapping[str, Ranks],
        regions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(job, adapter, clients)
        self.server_cpu_s: list[float] = []
        self.client_cpu_s: list[float] = []
        self.uploads: Mapping[str, bytes] = {}
        self.before = self.server
        self.regions = regions
        self.said: list[int] = []
        self.sums: list[Mapping[str, bytes]] = []

    def client_turn(self, client: str, step: Train) -> bytes:
        """One client's turn, timed but for its training."""
        trained = 0.0

        def timed(state: State, round: int, seed: int) -> Trained:
            nonlocal trained
            began = time.process_time()
            after = step(state, round, seed)
            trained = time.process_time() - began
            return after

        began = time.process_time()
        payload = super().client_turn(client, timed)
        self.client_cpu_s.append(time.process_time() - began - trained)
        return payload

    def server_turn(self, uploads: Mapping[str, bytes]) -> ServerTurn:
        """The server's turn, timed."""
        self.uploads, self.before = uploads, self.server
        watched = self.regions and Watched(self.regions, lambda region, way, kind, size: self.said.append(size))
        began = time.process_time()  # the clock on the wall would count whatever else the machine does
        turn = server_turn(self.job, self.server, uploads, self.number, tree=watched or None)
        self.server_cpu_s.append(time.process_time() - began)
        self.server = turn.state
        if watched:
            self.sums.append(watched.sums)
        return turn


class Watched(Tree):
    """A tree of regions that keeps what they sent."""

    sums: Mapping[str, bytes]

    def sum_up(self, job: Job, state: State, cohort: Cohort, round: int) -> dict[str, bytes]:
        """See `Tree.sum_up`."""
        found = super().sum_up(job, state, cohort, round)
        object.__setattr__(self, "sums", found)  # the tree itself is frozen
        return found
