"""The SuperLink's database gives back what Flower has deleted in it."""

import socket
import sqlite3
from contextlib import closing

import pytest
from typer.testing import CliRunner

from fedloom.cli import main as cli
from fedloom.deploy.federation import FederationPlan, write_federation
from fedloom.deploy.prune import shrink_database
from fedloom.errors import ConfigError


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
