"""The jobs that a site works for at the same time: what is loaded for each, and when it is let go of."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from fedloom.methods.method import State
from fedloom.records.ledger import Row
from fedloom.rounds.memory import give_back
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

    held: the state that the job is in, None where what is on disk is to be read again. first: the state before the
    first round, until it is on disk; of `setup.initial` the shapes alone are left. used: when a request was worked on
    last, by the clock of `time.monotonic`.
    """

    job: str
    settings: str
    setup: Setup
    store: Store
    held: TurnRecord | None = None
    first: State | None = None
    used: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, job: str, settings: str, setup: Setup, store: Store, site: str) -> Place:
        """The place of a job, with the state before its first round where nothing of it is on disk."""
        first = None if store.exists() else start(setup.job, setup.initial, setup.sites[site].ranks)
        return cls(job, settings, setup.outlined(), store, first=first)

    @property
    def was_taken_away(self) -> bool:
        """Whether the job's folder is gone (`fedloom site prune`): then the job is begun anew."""
        return self.first is None and not self.store.exists()

    def recall(self) -> TurnRecord | None:
        """The state that the job is in, read from disk where it is not held."""
        self.held = self.held or self.store.load()
        if self.held is None and self.first is not None:
            self.held = TurnRecord(0, self.first, self.first)
        return self.held

    def save(self, held: TurnRecord, rows: Sequence[Row]) -> None:
        """Have a state on disk, and be in it."""
        self.held = None  # where writing fails, what is on disk counts, and is read again
        self.store.save(held, rows)
        self.held, self.first = held.without_payload(), None

    def bring_in_step(self, state: State, payloads: list[bytes], tell: Callable[[bytes], object]) -> State:
        """The state after what the server sent; `tell` is called with what of that was new.

        The payloads are taken out of the list as they are used up: each may be as large as the state. A change that was
        applied before is skipped: it was sent again because nobody knew.
        """
        known = state.version
        while payloads:
            payload = payloads.pop(0)
            if not _was_applied(payload, known):
                state = accept(self.setup.job, state, payload)
                tell(payload)
            size = len(payload)
            del payload
            give_back(size)
        return state


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
        if place.was_taken_away:
            self.drop([place])
            return None
        del self._by_job[job]
        self._by_job[job] = place
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
