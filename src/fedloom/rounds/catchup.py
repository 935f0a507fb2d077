"""What to send a client that has missed rounds: the missed broadcasts or the full state, whichever is smaller.

Where the newest broadcast says all there is (`Method.replaces`), it alone is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from fedloom.methods.method import State
from fedloom.rounds.job import Job
from fedloom.rounds.joint import names_in
from fedloom.rounds.turns import full_state, narrow_broadcast

Cut = tuple[int, frozenset[tuple[str, int]]]
"""A version, and the ranks that the broadcast which applies to it is cut to; no ranks: this version's full state."""


class Archive:
    """The broadcasts that a client may still have missed, by the version they apply to.

    It holds at most as many bytes as one full state: beyond that, the full state is cheaper. hold: makes what they are
    kept in, and what is made of them once for all clients of the same ranks; dictionaries if left out.
    """

    def __init__(
        self,
        payloads: Mapping[int, bytes] | None = None,
        hold: Callable[[], MutableMapping[Any, bytes]] = dict,
    ) -> None:
        self.payloads: MutableMapping[int, bytes] = hold()
        self.payloads.update(payloads or {})
        self._sizes = {version: len(payload) for version, payload in (payloads or {}).items()}
        self._made: MutableMapping[Cut, bytes] = hold()
        self._lengths: dict[Cut, int] = {}
        self._whole: tuple[int, bool] | None = None

    def add(self, version: int, payload: bytes, limit: int) -> None:
        """Keep the broadcast that leads from `version` to the next; forget what exceeds `limit` bytes in all."""
        if version - 1 not in self.payloads:  # the server consolidated: older broadcasts lead nowhere now
            self.payloads.clear()
            self._sizes.clear()
        self.payloads[version], self._sizes[version] = payload, len(payload)
        while len(self.payloads) > 1 and sum(self._sizes.values()) > limit:
            oldest = min(self.payloads)
            del self.payloads[oldest], self._sizes[oldest]
        for cut in [cut for cut in self._made if not cut[1] or cut[0] not in self.payloads]:
            del self._made[cut], self._lengths[cut]

    def reach(self, version: int) -> int:
        """The oldest version from which the broadcasts lead to `version`; older ones need a full state."""
        while version - 1 in self.payloads:
            version -= 1
        return version

    def payloads_for(self, job: Job, server: State, version: int, ranks: Mapping[str, int], round: int) -> list[bytes]:
        """The payloads, in order, that bring a client at `version` in step with the server."""
        needed = self.versions_for(job, server, version)
        cut = frozenset(ranks.items()) if job.method.cuts(server.adapter, ranks) else None
        if cut is not None:
            for held in needed or ():
                if (held, cut) not in self._made:
                    self._keep((held, cut), narrow_broadcast(job, self.payloads[held], ranks))
        size = sum(self._sizes[held] if cut is None else self._lengths[held, cut] for held in needed or ())
        # A full state takes at least a byte a value. Where the broadcasts take less, it need not be encoded to compare.
        if needed is None or size > server.numel():
            whole: Cut = server.version, frozenset()
            if whole not in self._made:
                self._keep(whole, full_state(job, server, round))
            if needed is None or size > self._lengths[whole]:
                return [self._made[whole]]
        return [self.payloads[held] if cut is None else self._made[held, cut] for held in needed]

    def _keep(self, cut: Cut, payload: bytes) -> None:
        self._made[cut], self._lengths[cut] = payload, len(payload)

    def versions_for(self, job: Job, server: State, version: int) -> range | None:
        """The versions whose broadcasts bring a client at `version` in step; None where only a full state does."""
        newest = server.version - 1
        if 0 <= version < newest and self.says_all(job, server):
            return range(newest, server.version)
        return range(version, server.version) if version >= self.reach(server.version) else None

    def says_all(self, job: Job, server: State) -> bool:
        """Whether the newest broadcast alone brings a client of any version in step."""
        newest = server.version - 1
        if not job.method.replaces or newest not in self.payloads:
            return False
        if self._whole is None or self._whole[0] != server.version:
            self._whole = server.version, job.method.says_all(names_in(self.payloads[newest], server), server.adapter)
        return self._whole[1]
