"""How a site stands: its worker, its record, its disk, the jobs that wait. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedloom.site.approval import JobBook
from fedloom.site.audit import AuditTrail
from fedloom.site.config import SiteConfig
from fedloom.site.presence import Presence, is_running, read_presence
from fedloom.site.privacy import epsilon
from fedloom.site.prune import list_folders
from fedloom.site.summary import describe_examples_spent


@dataclass(frozen=True, slots=True)
class Overview:
    """examples: what was spent on single examples, in words; "" without such noise.

    last: the newest request. bytes_day: that left in 24 hours; updates: that ever left. epsilon: of all noise at
    delta; None without noise. disk: bytes of the whole state folder, with those of the record and of jobs in it.
    """

    running: bool
    last: Presence | None
    updates: int
    bytes_day: int
    bytes_all: int
    epsilon: float | None
    delta: float | None
    disk: int
    disk_audit: int
    disk_jobs: int
    jobs: int
    waiting: tuple[str, ...]
    examples: str = ""


def look_at_site(site: SiteConfig, book: JobBook, now: datetime) -> Overview:
    """The site as its files tell. Raises AuditError where its record was altered."""
    state = Path(site.state)
    trail = AuditTrail(state / "audit")
    lines, spent, folders = trail.lines(), trail.count_spent("", 0, now), list(list_folders(state))
    privacy = site.policy.privacy
    return Overview(
        running=is_running(site.socket),
        last=read_presence(state),
        updates=len({line.payload for line in lines if line.payload}),
        bytes_day=spent.bytes_day,
        bytes_all=sum(line.bytes for line in lines),
        epsilon=epsilon(math.sqrt(spent.mu_squared), privacy.delta) if privacy else None,
        delta=privacy.delta if privacy else None,
        disk=size_of(state),
        disk_audit=size_of(state / "audit"),
        disk_jobs=sum(folder.bytes for folder in folders),
        jobs=len(folders),
        waiting=tuple(job.name for job in book.jobs() if job.standing(book.ask, now) == "waiting"),
        examples=describe_examples_spent(lines) if spent.sampled else "",
    )


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
