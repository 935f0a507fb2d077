"""What is old and over goes; the record of what left, and whatever may be needed, stays."""

import os
import socket
import sqlite3
import time
from contextlib import closing

import pytest
from typer.testing import CliRunner

from fedloom.cli import main as cli
from fedloom.deploy.federation import FederationPlan, write_federation
from fedloom.deploy.prune import prune_jobs, shrink_database
from fedloom.errors import ConfigError


def job(state, name, days, delivered=True):
    folder = state / "jobs" / name
    (folder / "adapter").mkdir(parents=True) if delivered else folder.mkdir(parents=True)
    file = folder / ("adapter/adapter_model.safetensors" if delivered else "ledger.jsonl")
    file.write_bytes(bytes(1000))
    os.utime(file, (time.time() - 86400 * days,) * 2)


@pytest.fixture
def state(tmp_path):
    for name, days, delivered in (("old", 100, True), ("open", 100, False), ("new", 80, True)):
        job(tmp_path / "state", name, days, delivered)
    (tmp_path / "state" / "audit").mkdir()
    (tmp_path / "state" / "audit" / "audit.jsonl").write_text("{}\n")
    os.utime(tmp_path / "state" / "audit" / "audit.jsonl", (0, 0))
    return tmp_path / "state"


def jobs(state):
    return sorted(path.name for path in (state / "jobs").iterdir())


def test_only_jobs_that_were_delivered_long_ago_go(state):
    said = prune_jobs(state, 90, dry_run=True)
    assert jobs(state) == ["new", "old", "open"] and "would remove job old" in said[0]
    said = prune_jobs(state, 90)
    assert jobs(state) == ["new", "open"] and "unused for 100 days" in said[0] and "never delivered" in said[1]
    assert (state / "audit" / "audit.jsonl").read_text() == "{}\n"
    assert "never delivered" in prune_jobs(state, 90)[0] and "no delivered job" in prune_jobs(state, 1000)[0]


@pytest.fixture
def server(tmp_path):
    """A server whose database has deleted a lot."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    write_federation(tmp_path / "fed", FederationPlan(address="localhost:1", listen=f"127.0.0.1:{port}"), ["lab"])
    path = tmp_path / "fed" / "server" / "state" / "superlink.db"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE objects (content BLOB)")
        database.execute("INSERT INTO objects VALUES (?)", (bytes(2**21),))
        database.commit()
        database.execute("DELETE FROM objects")
        database.commit()
    return tmp_path / "fed" / "server", path, port


def test_the_database_gives_back_what_flower_has_freed(server):
    folder, path, _ = server
    assert "2.0 MiB are free" in shrink_database(folder, dry_run=True)[0] and path.stat().st_size > 2**21
    told = CliRunner().invoke(cli.app, ["federation", "prune", str(folder)])
    assert told.exit_code == 0 and path.stat().st_size < 2**15


def test_a_database_in_use_is_left_alone(server):
    folder, path, port = server
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match="stop it first"):
        shrink_database(folder)
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match="smaller"):
        shrink_database(folder)


def test_a_site_is_pruned_by_its_file(tmp_path):
    write_federation(tmp_path / "fed", FederationPlan(address="localhost:1", listen="127.0.0.1:2"), ["lab"])
    site = tmp_path / "fed" / "sites" / "lab"
    job(site / "state", "old", 10)
    told = CliRunner().invoke(cli.app, ["federation", "prune", str(site / "SITE.toml"), "--days", "9"])
    assert told.exit_code == 0 and "removed job old" in told.stdout and jobs(site / "state") == []
