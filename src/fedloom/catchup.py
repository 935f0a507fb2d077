"""What to send a client that has missed rounds: the missed broadcasts or the full state, whichever is smaller."""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.method import State
from fedloom.rounds import Job, addressed, full_state


class Archive:
    """The broadcasts that a client may still have missed, by the version they apply to.

    Never holds more bytes than one full state has: beyond that, the full state is cheaper.
    """

    def __init__(self, payloads: Mapping[int, bytes] | None = None) -> None:
        self.payloads = dict(payloads or {})
        self._full: tuple[int, bytes] | None = None

    def add(self, version: int, payload: bytes, limit: int) -> None:
        """Keep the broadcast that leads from `version` to the next; forget what exceeds `limit` bytes in all."""
        self.payloads[version] = payload
        while len(self.payloads) > 1 and sum(map(len, self.payloads.values())) > limit:
            del self.payloads[min(self.payloads)]

    def needed(self, job: Job, server: State, version: int, ranks: Mapping[str, int], round: int) -> list[bytes]:
        """The payloads, in order, that bring a client at `version` in step with the server."""
        versions = range(version, server.version)
        missed = [addressed(job, self.payloads[v], ranks) for v in versions if v in self.payloads]
        if len(missed) == len(versions) and len(missed) <= 1:
            return missed
        if self._full is None or self._full[0] != server.version:
            self._full = (server.version, full_state(job, server, round))
        full = self._full[1]
        complete = len(missed) == len(versions)
        return missed if complete and sum(map(len, missed)) <= len(full) else [full]
