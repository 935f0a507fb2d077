"""What to send a client that has missed rounds: the missed broadcasts or the full state, whichever is smaller.

Where the newest broadcast says all there is (`Method.replaces`), it alone is enough. Where several do so together, as
RoLoRA's newest two, one payload with the newest of every tensor is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from fedloom.methods.method import State
from fedloom.rounds.job import Job
from fedloom.rounds.joint import names_in
from fedloom.rounds.turns import full_state, narrow_broadcast
from fedloom.wire import Message, decode, encode, read_header

MOST_DIGESTS = 1000
"""Versions whose digests are remembered, 32 characters each: a checkpoint has them all."""
Cut = tuple[range, frozenset[tuple[str, int]]]
"""The versions whose broadcasts are in one payload, and the ranks that it is cut to, if to any.

The full state of a version has none: the range is empty and ends with it.
"""


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
        self._enough: tuple[int, int] | None = None

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
        for cut in [cut for cut in self._made if len(cut[0]) != 1 or cut[0].start not in self._sizes]:
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

        alone: whether it takes the newest broadcasts without those before them, where these say all there is.
        """
        pieces = self.pieces_for(job, server, version, alone=alone)
        narrowed = frozenset(ranks.items()) if job.method.cuts(server.adapter, ranks) else frozenset()
        cuts: list[Cut] = [(piece, narrowed) for piece in pieces or ()]
        size = sum(self._make(job, cut) for cut in cuts)
        # A full state takes at least a byte a value. Where the broadcasts take less, it need not be encoded to compare.
        if pieces is None or size > server.numel():
            whole: Cut = range(server.version, server.version), frozenset()
            if whole not in self._made:
                self._keep(whole, full_state(job, server, round))
            if pieces is None or size > self._lengths[whole]:
                return [self._made[whole]]
        return [self._made[cut] if cut in self._made else self.payloads[cut[0].start] for cut in cuts]

    def _make(self, job: Job, wanted: Cut) -> int:
        """The size of a payload of these broadcasts, which is made if it is none of those that are held."""
        piece, ranks = wanted
        if len(piece) == 1 and not ranks:
            return self._sizes[piece.start]
        if wanted not in self._made:
            payload = join_broadcasts(job, [self.payloads[held] for held in piece])
            self._keep(wanted, narrow_broadcast(job, payload, dict(ranks)) if ranks else payload)
        return self._lengths[wanted]

    def _keep(self, cut: Cut, payload: bytes) -> None:
        self._made[cut], self._lengths[cut] = payload, len(payload)

    def pieces_for(self, job: Job, server: State, version: int, *, alone: bool = True) -> list[range] | None:
        """The versions whose broadcasts are in each payload that a client at `version` needs.

        None where only a full state brings it in step.
        """
        enough = self.enough(job, server) if alone and version >= 0 else 0
        if 0 < enough < server.version - version:
            return [range(server.version - enough, server.version)]
        reached = version >= self.reach(server.version)
        return [range(held, held + 1) for held in range(version, server.version)] if reached else None

    def enough(self, job: Job, server: State) -> int:
        """How many of the newest broadcasts bring a client of any version in step; 0 where all of them do not."""
        newest = server.version - 1
        if newest not in self._sizes or not job.method.replaces:
            return 0
        if self._enough is None or self._enough[0] != newest:
            self._enough = newest, self._count_enough(job, server)
        return self._enough[1]

    def _count_enough(self, job: Job, server: State) -> int:
        # The codes of joined payloads are of one adapter each, and do not go into another payload.
        oldest = server.version - 1 if job.method.joins else self.reach(server.version)
        names: set[str] = set()
        for held in reversed(range(oldest, server.version)):
            names.update(names_in(self.payloads[held], server))
            if job.method.says_all(names, server.adapter):
                return server.version - held
        return 0


def join_broadcasts(job: Job, payloads: Sequence[bytes]) -> bytes:
    """One broadcast of several, the oldest first, each of which replaces the tensors that it names; of one, itself.

    Whoever applies it is where all of them lead, if together they say all there is (`Method.says_all`).
    """
    if len(payloads) == 1:
        return payloads[0]
    messages = [decode(payload) for payload in payloads]
    entries = {name: entry for message in messages for name, entry in message.entries.items()}
    return encode(Message(messages[-1].header, entries), folder=job.scratch)
