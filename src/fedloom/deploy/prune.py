"""An end of old things: a site's delivered jobs, and the space that the SuperLink's database leaves free.

A site's record of what left (state/audit) is never touched. Of the SuperLink's database only what Flower itself has
deleted goes: its Control API (flwr 1.41) has no call that removes a run.
"""

from __future__ import annotations

import shutil
import socket
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from fedloom.deploy.backup import DATABASE
from fedloom.deploy.federation import parse_endpoint, read_plan
from fedloom.deploy.roster import server_folder
from fedloom.errors import ConfigError
from fedloom.site.config import load_site_config

ADAPTER = "adapter"
"""The folder of a job that a delivered result is in (`site/store`)."""
_MIB = 2**20


def prune(path: Path, days: int, *, dry_run: bool = False) -> list[str]:
    """Prune a site (its SITE.toml, or the folder that holds it) or the server's folder; what was done, in sentences."""
    file = path / "SITE.toml" if path.is_dir() else path
    if file.is_file():
        return prune_jobs(Path(load_site_config(file).state), days, dry_run=dry_run)
    return shrink_database(server_folder(path), dry_run=dry_run)


def prune_jobs(state: Path, days: int, *, dry_run: bool = False) -> list[str]:
    """Remove the folders of jobs that were delivered and not touched for so many days.

    A worker may be running: it holds no job that nobody has asked about for a day.
    """
    said, waiting = [], 0
    for job in sorted((state / "jobs").glob("*/")):
        files = [file for file in job.rglob("*") if file.is_file() and not file.is_symlink()]
        used = max((file.stat().st_mtime for file in files), default=job.stat().st_mtime)
        age = int((time.time() - used) // 86400)
        if age < days:
            continue
        if not (job / ADAPTER).is_dir():
            waiting += 1
            continue
        size = sum(file.stat().st_size for file in files) / _MIB
        if not dry_run:
            shutil.rmtree(job)
        said.append(f"{'would remove' if dry_run else 'removed'} job {job.name}: {size:.1f} MiB, unused for {age} days")
    if waiting:
        said.append(f"kept {waiting} older jobs whose result was never delivered: {state / 'jobs'}, by hand")
    return said or [f"no delivered job in {state / 'jobs'} is older than {days} days"]


def shrink_database(server: Path, *, dry_run: bool = False) -> list[str]:
    """Give the space back that Flower has freed in its database. Raises ConfigError while a SuperLink is running."""
    path = server / "state" / DATABASE
    if not path.is_file():
        return [f"{path}: no such file; there is nothing to prune"]
    host, port = parse_endpoint(read_plan(server).listen, "listen")
    with socket.socket() as probe:
        probe.settimeout(2)
        if not dry_run and probe.connect_ex((host, port)) == 0:
            raise ConfigError(f"the SuperLink is running on {host}:{port}: stop it first")
    before = path.stat().st_size
    try:
        with closing(sqlite3.connect(path)) as database:
            free, size = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_size"))
            if dry_run:
                return [f"{path}: {before / _MIB:.1f} MiB, of which {free * size / _MIB:.1f} MiB are free"]
            database.execute("VACUUM")
    except sqlite3.Error as error:
        raise ConfigError(f"{path} cannot be made smaller: {error}") from None
    return [f"{path}: {before / _MIB:.1f} MiB before, {path.stat().st_size / _MIB:.1f} MiB now"]
