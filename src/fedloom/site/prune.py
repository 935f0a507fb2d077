"""Making room at a site: folders of jobs that are over go, the record of what left stays. Loads no torch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedloom.errors import ConfigError
from fedloom.site.config import SiteConfig
from fedloom.site.presence import is_running, read_presence

RESULT = "adapter"
"""What a job's folder holds once the result was delivered (`desk.deliver`)."""
REMOVED = "removed-"
"""Before the name of a folder that is being removed: a crash leaves no half of a job behind under its own name."""
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, slots=True)
class JobFolder:
    """What a job has on disk. used: when something of it was written last, UTC; delivered: its result is here."""

    path: Path
    bytes: int
    used: datetime
    delivered: bool


def list_folders(state: Path) -> Iterator[JobFolder]:
    """Every job's folder, by name."""
    for path in sorted((state / "jobs").glob("*/")):
        files = [file.lstat() for file in path.rglob("*") if not file.is_dir()]
        used = max((held.st_mtime for held in files), default=path.stat().st_mtime)
        size = sum(held.st_size for held in files)
        yield JobFolder(path, size, datetime.fromtimestamp(used, UTC), (path / RESULT).is_dir())


def prune_jobs(
    site: SiteConfig, older: timedelta, now: datetime, *, force: bool = False
) -> tuple[list[JobFolder], dict[str, str]]:
    """(the folders that were removed, job → why it was kept though it is old enough).

    force: also those whose result never came. The job that a worker is busy with is always kept.
    """
    state = Path(site.state)
    removed, kept = [], {}
    for path in state.glob(f"{REMOVED}*"):
        shutil.rmtree(path, ignore_errors=True)
    busy = busy_job(site)
    for folder in list_folders(state):
        job = folder.path.name
        if folder.used > now - older:
            continue
        if job == busy:
            kept[job] = "the worker is busy with it"
        elif not (folder.delivered or force):
            kept[job] = "its result has not been delivered; --force removes it too"
        else:
            gone = state / f"{REMOVED}{job}"
            os.replace(folder.path, gone)
            shutil.rmtree(gone)
            removed.append(folder)
    return removed, kept


def busy_job(site: SiteConfig) -> str | None:
    """The job that a running worker is answering a request of."""
    said = read_presence(Path(site.state))
    return said.job if said is not None and not said.answered and is_running(site.socket) else None


def parse_age(text: str) -> timedelta:
    """The time that "30d", "12h" or "2w" means. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d{1,5})([hdw])", text.strip())
    if not found:
        raise ConfigError(f"--older {text}: expected a number of days, hours or weeks, such as 30d, 12h or 2w")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})
