"""Copies hold all that cannot be made again, for their owner alone, and come back as they were or not at all."""

import fcntl
import io
import json
import os
import shutil
import socket
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedloom.cli import main as cli
from fedloom.deploy.backup import MANIFEST, back_up, restore
from fedloom.deploy.federation import FederationPlan, write_federation
from fedloom.errors import ConfigError


@pytest.fixture
def made(tmp_path):
    write_federation(tmp_path / "fed", FederationPlan(address="localhost:8443", listen="127.0.0.1:8443"), ["lab"])
    return tmp_path / "fed"


@pytest.fixture
def site(made):
    """A site that has worked: a job, a record, a secret of its own."""
    state = made / "sites" / "lab" / "state"
    for path, mode in (("jobs/1/round-00001.safetensors", 0o600), ("audit/audit.jsonl", 0o644), ("order.key", 0o600)):
        (state / path).parent.mkdir(parents=True, exist_ok=True)
        (state / path).write_text(path)
        (state / path).chmod(mode)
    state.chmod(0o700)
    (state / ".lock").touch()
    return made / "sites" / "lab"


def held(folder):
    """What a folder holds: path → (mode, content)."""
    found = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {
        str(path.relative_to(folder)): (path.stat().st_mode & 0o777, path.read_bytes() if path.is_file() else None)
        for path in found
    }


def test_a_sites_copy_comes_back_with_the_same_files_and_modes(site, tmp_path):
    before = held(site)
    done = back_up(site, tmp_path / "copy.tar")
    assert (tmp_path / "copy.tar").stat().st_mode & 0o777 == 0o600 and done.left_out == []
    said = restore(tmp_path / "new", tmp_path / "copy.tar")
    assert held(tmp_path / "new") == before and "noise is not counted" in said[-1]
    assert (tmp_path / "new" / "node.key").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.tar", "fed", "new"]


def test_a_state_that_lies_elsewhere_comes_back_to_its_place(site, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "state"
    elsewhere.parent.mkdir()
    shutil.move(site / "state", elsewhere)
    file = site / "SITE.toml"
    file.write_text(file.read_text().replace('state = "./state"', f'state = "{elsewhere}"'))
    before = held(elsewhere)
    back_up(site, tmp_path / "copy.tar")
    with pytest.raises(ConfigError, match="written over"):
        restore(tmp_path / "new", tmp_path / "copy.tar")
    assert not (tmp_path / "new").exists()
    shutil.rmtree(elsewhere)
    restore(tmp_path / "new", tmp_path / "copy.tar")
    assert held(elsewhere) == before and elsewhere.stat().st_mode & 0o777 == 0o700


def test_a_running_worker_is_not_copied_unless_asked(site, tmp_path):
    with (site / "state" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="worker of site lab is running"):
            back_up(site, tmp_path / "copy.tar")
        assert not list(tmp_path.glob("copy*"))
        assert back_up(site, tmp_path / "copy.tar", while_running=True).files > 5


def test_the_record_of_what_left_is_copied_last(site, tmp_path):
    """A copy of a running site must not hold a job's reply that its record does not know of."""
    back_up(site, tmp_path / "copy.tar", while_running=True)
    with tarfile.open(tmp_path / "copy.tar") as tar:
        names = tar.getnames()
    assert names[-2:] == ["files/state/audit/audit.jsonl", MANIFEST]


def test_the_superlinks_database_is_copied_while_it_is_written_to(made, tmp_path):
    path = made / "server" / "state" / "superlink.db"
    path.parent.mkdir(mode=0o700)
    with closing(sqlite3.connect(path)) as used:
        used.execute("PRAGMA journal_mode=WAL")
        used.execute("CREATE TABLE node (name TEXT)")
        used.execute("INSERT INTO node VALUES ('lab')")
        used.commit()
        path.chmod(0o600)
        used.execute("INSERT INTO node VALUES ('not yet')")  # a transaction that is open
        assert (path.parent / "superlink.db-wal").stat().st_size
        back_up(made / "server", tmp_path / "copy.tar")
    restore(tmp_path / "new", tmp_path / "copy.tar")
    copied = tmp_path / "new" / "state" / "superlink.db"
    with closing(sqlite3.connect(copied)) as found:
        assert found.execute("SELECT name FROM node").fetchall() == [("lab",)]
    assert copied.stat().st_mode & 0o777 == 0o600
    private = {
        path.name
        for path in (tmp_path / "new").rglob("*")
        if b"PRIVATE" in (path.read_bytes() if path.is_file() else b"")
    }
    assert private == {"server.key"} and (tmp_path / "new" / "server.key").stat().st_mode & 0o777 == 0o600


def test_runs_are_taken_along_where_they_are_named(made, tmp_path):
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    with pytest.raises(ConfigError, match="no run's folder"):
        back_up(made / "server", tmp_path / "copy.tar", [run])
    (run / "ledger.jsonl").write_text("{}\n")
    back_up(made / "server", tmp_path / "copy.tar", [run])
    said = restore(tmp_path / "new", tmp_path / "copy.tar")
    assert (tmp_path / "new" / "runs" / "first" / "ledger.jsonl").read_text() == "{}\n" and "move each run" in said[1]


def test_links_and_sockets_are_left_out_and_said_so(site, tmp_path):
    (site / "data").symlink_to("/etc")
    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(site)
        try:
            listener.bind("worker.sock")
        finally:
            os.chdir(before)
    told = CliRunner().invoke(cli.app, ["federation", "backup", str(site), str(tmp_path / "copy.tar")])
    assert told.exit_code == 0 and "worker.sock" in told.stdout and "data" in told.stdout
    restore(tmp_path / "new", tmp_path / "copy.tar")
    assert not (tmp_path / "new" / "data").exists() and not (tmp_path / "new" / "worker.sock").exists()


def test_nothing_is_written_over(site, tmp_path):
    back_up(site, tmp_path / "copy.tar")
    with pytest.raises(ConfigError, match="written over"):
        back_up(site, tmp_path / "copy.tar")
    before = held(site)
    with pytest.raises(ConfigError, match="written over"):
        restore(site, tmp_path / "copy.tar")
    assert held(site) == before
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="federation init"):
            back_up(folder, tmp_path / "other.tar")


def rewritten(source, target, change):
    """The archive with each member as change(member, content) says; None leaves it out."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            content = old.extractfile(member)
            kept = change(member, content.read() if content else b"")
            if kept is not None:
                member.size = len(kept) if member.isreg() else 0
                new.addfile(member, io.BytesIO(kept))


def another_key(member, content):
    return content.replace(b"A", b"B") if member.name.endswith("node.key") else content


def without_a_key(member, content):
    return None if member.name.endswith("node.key") else content


def climbing(member, content):
    member.name = member.name.replace("files/node.key", "files/../../node.key")
    return content


def as_a_link(member, content):
    if member.name.endswith("node.key"):
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return content


def without_a_list(member, content):
    return None if member.name == MANIFEST else content


def of_tomorrow(member, content):
    return json.dumps({**json.loads(content), "format": 2}).encode() if member.name == MANIFEST else content


@pytest.mark.parametrize(
    "change", [another_key, without_a_key, climbing, as_a_link, without_a_list, of_tomorrow], ids=lambda c: c.__name__
)
def test_a_copy_that_was_changed_is_refused_and_leaves_nothing(site, tmp_path, change):
    back_up(site, tmp_path / "copy.tar")
    rewritten(tmp_path / "copy.tar", tmp_path / "changed.tar", change)
    with pytest.raises(ConfigError, match="changed.tar"):
        restore(tmp_path / "new", tmp_path / "changed.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed.tar", "copy.tar", "fed"]


@pytest.mark.parametrize("part", [0, 100, 0.3, 0.6])
def test_a_copy_that_was_cut_is_refused(site, tmp_path, part):
    back_up(site, tmp_path / "copy.tar")
    content = (tmp_path / "copy.tar").read_bytes()
    cut = int(part * len(content)) if part < 1 else part
    (tmp_path / "copy.tar").write_bytes(content[: cut - cut % 512 if part == 0.6 else cut])
    told = CliRunner().invoke(cli.app, ["federation", "restore", str(tmp_path / "new"), str(tmp_path / "copy.tar")])
    assert told.exit_code == 2 and "copy.tar" in told.stderr and not (tmp_path / "new").exists()
