"""The jobs that a site works for at the same time: what is loaded for each, and when it is let go of."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fedloom.methods.method import State
from fedloom.rounds.turns import accept, start
from fedloom.site.store import Store, TurnRecord
from fedloom.wire import read_header
from fedloom.workspace.assemble import Setup

log = logging.getLogger("fedloom.worker")

MOST_PLACES = 4
"""Jobs that are loaded at once. Beside the base model, which they share, each takes some times its adapter and the
site's examples as tokens."""


@dataclass(eq=False, slots=True)
class Place:
    """A job that the site is working for, with everything loaded.

    held: the state that the job is in, None where what is on disk is to be read again. used: when a request was worked
    on last, by the clock of `time.monotonic`.
    """

    job: str
    settings: str
    setup: Setup
    store: Store
    held: TurnRecord | None = None
    used: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Where the job's folder was taken away meanwhile (`fedloom site prune`), the job is begun anew."""
        if self.held is not None and self.held.round and not self.store.exists():
            self.store.close()
            self.held = None

    def first_record(self, site: str) -> TurnRecord:
        """The state before the first round."""
        state = start(self.setup.job, self.setup.initial, self.setup.sites[site].ranks)
        return TurnRecord(0, state, state)

    def bring_in_step(self, state: State, payloads: Sequence[bytes]) -> tuple[State, list[bytes]]:
        """(the state after what the server sent, what of that was new). A change that was applied before is skipped: it
        was sent again because nobody knew.
        """
        fresh = [payload for payload in payloads if not _was_applied(payload, state.version)]
        for payload in fresh:
            state = accept(self.setup.job, state, payload)
        return state, fresh


class Places:
    """The places by job, the one that was asked for longest ago first."""

    def __init__(self) -> None:
        self._by_job: dict[str, Place] = {}

    def __iter__(self) -> Iterator[Place]:
        return iter(self._by_job.values())

    def __len__(self) -> int:
        return len(self._by_job)

    @property
    def newest(self) -> Place | None:
        """The place that was asked for last."""
        return next(reversed(self._by_job.values()), None)

    def get(self, job: str) -> Place | None:
        """The job's place, whether it was asked for or not."""
        return self._by_job.get(job)

    def find(self, job: str, settings: str) -> Place | None:
        """The job's place, asked for now; None where there is none with these settings."""
        place = self._by_job.get(job)
        if place is None or place.settings != settings:
            return None
        del self._by_job[job]
        self._by_job[job] = place
        place.look()
        return place

    def rest(self, job: str) -> None:
        """A request of this job was worked on: from now on its place is idle."""
        if job in self._by_job:
            self._by_job[job].used = time.monotonic()

    def add(self, place: Place) -> list[Place]:
        """Have a further place, in that of the same job if there is one. Returns those that make room for it."""
        gone = [held for held in (self._by_job.pop(place.job, None),) if held is not None]
        self._by_job[place.job] = place
        gone += list(self)[: max(len(self) - MOST_PLACES, 0)]
        return self.drop(gone)

    def drop(self, places: list[Place]) -> list[Place]:
        """Let go of these: their folders are closed, their models and data are garbage."""
        for place in places:
            place.store.close()
            place.held = None
            if self._by_job.get(place.job) is place:
                del self._by_job[place.job]
        return places

    def idle(self, seconds: float) -> list[Place]:
        """Those that nobody has asked for in so many seconds."""
        now = time.monotonic()
        return [place for place in self if now - place.used > seconds]


def _was_applied(payload: bytes, version: int) -> bool:
    header = read_header(payload)
    return header.kind == "change" and header.base_version < version
