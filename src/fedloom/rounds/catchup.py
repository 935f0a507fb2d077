"""What to send a client that has missed rounds: the missed broadcasts or the full state, whichever is smaller.

Where the newest broadcast says all there is (`Method.replaces`), it alone is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from fedloom.methods.method import State
from fedloom.rounds.job import Job
from fedloom.rounds.joint import split_entries
from fedloom.rounds.turns import full_state, narrow_broadcast
from fedloom.wire import decode, read_header

MOST_DIGESTS = 1000
"""Versions whose digests are remembered, 32 characters each: a checkpoint has them all."""
Ranks = tuple[tuple[str, int], ...]
HELD_BYTES = 16 * 2**20
"""Bytes of broadcasts, as they were cut for clients of some ranks, that are kept for the next such client."""


class Archive:
    """The broadcasts that a client may still have missed, by the version they apply to.

    It holds at most as many bytes as one full state: beyond that, the full state is cheaper. held: where they are kept;
    a dictionary if left out. digests: version → digest of the state, of broadcasts that are forgotten too.
    """

    def __init__(
        self,
        payloads: Mapping[int, bytes] | None = None,
        held: MutableMapping[int, bytes] | None = None,
        digests: Mapping[int, str] | None = None,
    ) -> None:
        self.payloads: MutableMapping[int, bytes] = {} if held is None else held
        self.payloads.update(payloads or {})
        kept = dict(sorted((payloads or {}).items()))
        self.digests = dict(digests or {}) | {v: read_header(payload).base_digest for v, payload in kept.items()}
        self._sizes = {version: len(payload) for version, payload in kept.items()}
        self._total = sum(self._sizes.values())
        self._full: tuple[int, bytes] | None = None
        self._whole: tuple[int, bool] | None = None
        self._cut: dict[tuple[int, Ranks], bytes] = {}
        self._cut_bytes = 0

    def add(self, version: int, payload: bytes, limit: int, digest: str = "") -> None:
        """Keep the broadcast that leads from `version` to the next; forget what exceeds `limit` bytes in all.

        digest: of the state at `version`, where sites elsewhere may come back with it.
        """
        if version - 1 not in self.payloads:  # the server consolidated: older broadcasts lead nowhere now
            self.payloads.clear()
            self._sizes.clear()
            self._total = 0
        self.payloads[version], self._sizes[version] = payload, len(payload)
        self._total += len(payload)
        while len(self._sizes) > 1 and self._total > limit:
            oldest = next(iter(self._sizes))
            self._total -= self._sizes.pop(oldest)
            del self.payloads[oldest]
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
        kind = tuple(sorted(ranks.items()))
        missed = [self._cut_to(job, v, kind) for v in needed or ()]
        size = sum(map(len, missed))
        # A full state takes at least a byte a value. Where the broadcasts take less, it need not be encoded to compare.
        if needed is not None and size <= server.total.numel():
            return missed
        if self._full is None or self._full[0] != server.version:
            self._full = (server.version, full_state(job, server, round))
        return missed if needed is not None and size <= len(self._full[1]) else [self._full[1]]

    def _cut_to(self, job: Job, version: int, kind: Ranks) -> bytes:
        """A broadcast as clients of these ranks are sent it: the same object for all of them, while it is kept."""
        if (version, kind) not in self._cut:
            cut = narrow_broadcast(job, self.payloads[version], dict(kind))
            if self._cut_bytes + len(cut) > HELD_BYTES:
                self._cut, self._cut_bytes = {}, 0
            if len(cut) > HELD_BYTES:
                return cut
            self._cut[version, kind] = cut
            self._cut_bytes += len(cut)
        return self._cut[version, kind]

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
            entries = split_entries(decode(self.payloads[newest]).entries, server)
            self._whole = newest, job.method.says_all(entries, server.adapter)
        return self._whole[1]
