"""What to send a client that has missed rounds: the missed broadcasts or the full state, whichever is smaller."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from fedloom.methods.method import State
from fedloom.rounds.job import Job
from fedloom.rounds.turns import full_state, narrow_broadcast


class Archive:
    """The broadcasts that a client may still have missed, by the version they apply to.

    It holds at most as many bytes as one full state: beyond that, the full state is cheaper. held: where they are kept;
    a dictionary if left out.
    """

    def __init__(
        self, payloads: Mapping[int, bytes] | None = None, held: MutableMapping[int, bytes] | None = None
    ) -> None:
        self.payloads: MutableMapping[int, bytes] = {} if held is None else held
        self.payloads.update(payloads or {})
        self._sizes = {version: len(payload) for version, payload in (payloads or {}).items()}
        self._full: tuple[int, bytes] | None = None

    def add(self, version: int, payload: bytes, limit: int) -> None:
        """Keep the broadcast that leads from `version` to the next; forget what exceeds `limit` bytes in all."""
        if version - 1 not in self.payloads:  # the server consolidated: older broadcasts lead nowhere now
            self.payloads.clear()
            self._sizes.clear()
        self.payloads[version], self._sizes[version] = payload, len(payload)
        while len(self.payloads) > 1 and sum(self._sizes.values()) > limit:
            oldest = min(self.payloads)
            del self.payloads[oldest], self._sizes[oldest]

    def reach(self, version: int) -> int:
        """The oldest version from which the broadcasts lead to `version`; older ones need a full state."""
        while version - 1 in self.payloads:
            version -= 1
        return version

    def payloads_for(self, job: Job, server: State, version: int, ranks: Mapping[str, int], round: int) -> list[bytes]:
        """The payloads, in order, that bring a client at `version` in step with the server."""
        reached = version >= self.reach(server.version)
        missed = (
            [narrow_broadcast(job, self.payloads[v], ranks) for v in range(version, server.version)] if reached else []
        )
        size = sum(map(len, missed))
        # A full state takes at least a byte a value. Where the broadcasts take less, it need not be encoded to compare.
        if reached and size <= server.total.numel():
            return missed
        if self._full is None or self._full[0] != server.version:
            self._full = (server.version, full_state(job, server, round))
        return missed if reached and size <= len(self._full[1]) else [self._full[1]]
