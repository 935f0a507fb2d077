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
from fedloom.wire import read_header

MOST_DIGESTS = 1000
"""Versions whose digests are remembered, 32 characters each: a checkpoint has them all."""
Cut = tuple[int, frozenset[tuple[str, int]]]
"""A version, and the ranks that the broadcast which applies to it is cut to; no ranks: this version's full state."""


class Archive:
    """The broadcasts that a client may still have missed, by the version they apply to.

    It holds at most as many bytes as one full state: beyond that, the full state is cheaper. hold: makes what they are
    kept in, and what is made of them once for all clients of the same ranks; dictionaries if left out. digests: version
    → digest of the state, of broadcasts that are forgotten too.
    """

    def __init__(
        self,
        payloads: Mapping[int, bytes] | None = None,
        hold: Callable[[], MutableMapping[Any, bytes]] = dict,
        digests: Mapping[int, str] | None = None,
    ) -> None:
        kept = dict(sorted((payloads or {}).items()))
        self.payloads: MutableMapping[int, bytes] = hold()
        self.payloads.update(kept)
        self.digests = dict(digests or {}) | {v: read_header(payload).base_digest for v, payload in kept.items()}
        self._sizes = {version: len(payload) for version, payload in kept.items()}
        self._total = sum(self._sizes.values())
        self._made: MutableMapping[Cut, bytes] = hold()
        self._lengths: dict[Cut, int] = {}
        self._whole: tuple[int, bool] | None = None

    def add(self, version: int, payload: bytes, limit: int, digest: str = "") -> None:
        """Keep the broadcast that leads from `version` to the next; forget what exceeds `limit` bytes in all.

        digest: of the state at `version`, where sites elsewhere may come back with it.
        """
        if version - 1 not in self._sizes:  # the server consolidated: older broadcasts lead nowhere now
            self.payloads.clear()
            self._sizes.clear()
            self._total = 0
        self.payloads[version], self._sizes[version] = payload, len(payload)
        self._total += len(payload)
        while len(self._sizes) > 1 and self._total > limit:
            oldest = next(iter(self._sizes))
            self._total -= self._sizes.pop(oldest)
            del self.payloads[oldest]
        for cut in [cut for cut in self._made if not cut[1] or cut[0] not in self._sizes]:
            del self._made[cut], self._lengths[cut]
        self.digests[version] = digest
        if len(self.digests) > MOST_DIGESTS:
            del self.digests[next(iter(self.digests))]

    def reach(self, version: int) -> int:
        """The oldest version from which the broadcasts lead to `version`; older ones need a full state."""
        # Versions that are held follow on each other: `add` clears what does not lead on.
        return next(iter(self._sizes)) if version - 1 in self._sizes else version

    def payloads_for(
        self, job: Job, server: State, version: int, ranks: Mapping[str, int], round: int, *, alone: bool = True
    ) -> list[bytes]:
        """The payloads, in order, that bring a client at `version` in step with the server.

        alone: whether it takes the newest broadcast without those before it, where that says all there is.
        """
        needed = self.versions_for(job, server, version, alone=alone)
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

    def versions_for(self, job: Job, server: State, version: int, *, alone: bool = True) -> range | None:
        """The versions whose broadcasts bring a client at `version` in step; None where only a full state does."""
        newest = server.version - 1
        if alone and 0 <= version < newest and self.says_all(job, server):
            return range(newest, server.version)
        return range(version, server.version) if version >= self.reach(server.version) else None

    def says_all(self, job: Job, server: State) -> bool:
        """Whether the newest broadcast alone brings a client of any version in step."""
        newest = server.version - 1
        if newest not in self._sizes or not job.method.replaces:
            return False
        if self._whole is None or self._whole[0] != newest:
            self._whole = newest, job.method.says_all(names_in(self.payloads[newest], server), server.adapter)
        return self._whole[1]
