"""The space that the SuperLink's database leaves free. A site's old jobs are `fedloom site prune`'s.

Flower deletes messages and payloads of a run when that ends, but its database file keeps its size. What is left of a
run after that is a few rows, and its Control API (flwr 1.41) has no call that removes them.
"""

from __future__ import annotations

import socket
import sqlite3
from contextlib import closing
from pathlib import Path

from fedloom.deploy.backup import DATABASE
from fedloom.deploy.federation import parse_endpoint, read_plan
from fedloom.errors import ConfigError

_MIB = 2**20


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
