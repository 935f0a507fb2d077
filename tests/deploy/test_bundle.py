"""A site's bundle: what is in it, what is not, and the script that checks and installs it without a network."""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedloom.cli import main as cli
from fedloom.deploy import wheelhouse
from fedloom.deploy.backup import back_up
from fedloom.deploy.bundle import MARK, write_bundles
from fedloom.deploy.federation import FederationPlan, add_site, read_plan, write_federation
from fedloom.deploy.platforms import parse_targets
from fedloom.deploy.wheelhouse import Asked
from fedloom.errors import ConfigError
from fedloom.model.identity import base_digest
from fedloom.site.config import load_site_config
from tiny_wheels import VERSION, StandIn, make_fedloom, make_wheel

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
MODEL = TESTBED / "model"
HERE = Asked(tuple(parse_targets([], [])))
ASKED = FederationPlan(
    address="fed.example.org:9443",
    listen="127.0.0.1:8443",
    model=str(MODEL),
    data=str(TESTBED / "data" / "{site}" / "train.jsonl"),
    model_digest=base_digest(MODEL),
)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    made = tmp_path / "made"
    stand_in = StandIn(tmp_path / "pip", [make_fedloom(made, ["helper"]), make_wheel(made, "helper")])
    monkeypatch.setattr(wheelhouse, "PIP", stand_in.command)
    monkeypatch.setattr(wheelhouse, "pinned", lambda extras: ["helper==1"])  # the true ones take half a second
    return stand_in


@pytest.fixture
def fed(tmp_path, pip):
    write_federation(tmp_path / "fed", ASKED, ["bank", "lab"])
    return tmp_path / "fed"


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def install(bundle, target, **environment):
    told = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run([bundle / "install.sh", target], env=told, capture_output=True, text=True)


def test_a_bundle_holds_what_a_site_needs_and_every_file_is_in_its_list(fed):
    first, second = write_bundles(fed, [], HERE)
    assert (first.folder, second.folder) == (fed / "bundles" / "bank", fed / "bundles" / "lab")
    files = files_of(first.folder)
    wheels = {f"wheelhouse/fedloom-{VERSION}-py3-none-any.whl", "wheelhouse/helper-1-py3-none-any.whl"}
    assert {"install.sh", "README.txt", "SHA256SUMS", "site/SITE.toml", "site/ca.pem", "site/node.key", *wheels} <= set(
        files
    )
    lines = files["SHA256SUMS"].read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    assert listed == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name != "SHA256SUMS"
    }
    assert first.digest == hashlib.sha256(files["SHA256SUMS"].read_bytes()).hexdigest()
    assert first.bytes == sum(path.stat().st_size for path in files.values())
    assert base_digest(MODEL) in files["README.txt"].read_text() and "%{" not in files["install.sh"].read_text()


def test_keys_are_for_their_owner_alone_and_only_the_sites_own_is_there(fed):
    for name in ("state/order.key", "worker.token", "id_ecdsa", "other.pem"):
        (fed / "sites" / "bank" / name).parent.mkdir(exist_ok=True)
        (fed / "sites" / "bank" / name).write_text("PRIVATE KEY of something that lies there as well")
    bundle = write_bundles(fed, ["bank"], HERE)[0].folder
    files = files_of(bundle)
    secret = [name for name, path in files.items() if b"PRIVATE KEY" in path.read_bytes()]
    assert secret == ["site/node.key"]
    assert files["site/node.key"].read_bytes() == (fed / "sites" / "bank" / "node.key").read_bytes()
    assert files["site/node.key"].stat().st_mode & 0o777 == 0o600
    assert bundle.stat().st_mode & 0o777 == bundle.parent.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in files.values() if path.stat().st_mode & 0o111} == {"install.sh", "supernode.sh"}
    assert sorted(path.name for path in (fed / "bundles").glob("*")) == [".wheels", "bank"]


def test_a_full_disk_is_told_and_leaves_what_was_there(fed, monkeypatch):
    before = files_of(write_bundles(fed, ["bank"], HERE)[0].folder)

    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device; mend it"):
        write_bundles(fed, ["bank"], HERE)
    assert files_of(fed / "bundles" / "bank") == before and not (fed / "bundles" / ".bank.partial").exists()


def names_in(archive):
    with tarfile.open(archive) as opened:
        return opened.getnames()


def test_copies_hold_no_bundles_and_no_installation_of_one(fed, tmp_path):
    write_bundles(fed, ["bank"], HERE)
    site = fed / "sites" / "bank"
    (site / "venv").mkdir()
    (site / "venv" / "pyvenv.cfg").write_text("")
    back_up(site, tmp_path / "own.tar")
    (site / "venv" / MARK).write_text("begun")
    back_up(site, tmp_path / "site.tar")
    back_up(fed, tmp_path / "fed.tar")
    own, less, whole = map(names_in, (tmp_path / f"{name}.tar" for name in ("own", "site", "fed")))
    assert set(own) - set(less) == {"files/venv", "files/venv/pyvenv.cfg"}
    assert "files/sites/bank/node.key" in whole and not [name for name in whole if "bundles" in name]


def test_a_site_that_made_its_key_itself_gets_none(fed, tmp_path):
    add_site(fed, "own", fed / "sites" / "lab" / "node.pub")
    bundle = write_bundles(fed, ["own"], HERE)[0].folder
    assert not [name for name, path in files_of(bundle).items() if b"PRIVATE KEY" in path.read_bytes()]
    readme = (bundle / "README.txt").read_text()
    assert "private" not in readme and readme.startswith("Site own of the federation at fed.example.org:9443\n")


def test_sites_share_the_wheels_and_a_second_time_nothing_is_fetched(fed, pip):
    bundles = write_bundles(fed, [], HERE)
    wheels = [next((bundle.folder / "wheelhouse").glob("helper-*")) for bundle in bundles]
    assert wheels[0].samefile(wheels[1]) and len(pip.calls("download")) == 1
    (fed / "sites" / "bank" / "SITE.toml").write_text('name = "changed"\n')
    again = write_bundles(fed, ["bank"], HERE)[0]
    assert len(pip.calls("download")) == 1 and again.digest != bundles[0].digest
    assert "changed" in (again.folder / "site" / "SITE.toml").read_text()


def test_the_model_goes_along_where_it_is_asked_for_and_no_other_does(fed, tmp_path):
    bundle = write_bundles(fed, ["bank"], HERE, str(MODEL))[0].folder
    assert base_digest(bundle / "model") == base_digest(MODEL)
    assert load_site_config(bundle / "site" / "SITE.toml").model == str(bundle / "site" / "model")
    before = files_of(bundle)
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    (other / "config.json").write_text((MODEL / "config.json").read_text() + "\n")
    with pytest.raises(ConfigError, match="give the model that the federation was set up with"):
        write_bundles(fed, ["bank"], HERE, str(other))
    assert files_of(bundle) == before


def test_a_folder_that_is_no_bundle_and_a_site_that_is_none_are_left_alone(fed):
    with pytest.raises(ConfigError, match="has no site 'clinic', but bank, lab"):
        write_bundles(fed, ["clinic"], HERE)
    with pytest.raises(ConfigError, match="federation init"):
        write_bundles(fed / "server" / "nodes", [], HERE)
    mine = fed / "bundles" / "bank" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("kept")
    with pytest.raises(ConfigError, match="is no bundle; nothing is written over"):
        write_bundles(fed, ["bank"], HERE)
    assert mine.read_text() == "kept"


def test_the_script_refuses_what_is_not_whole(fed, tmp_path):
    bundle = write_bundles(fed, ["bank"], HERE)[0].folder
    helper = bundle / "wheelhouse" / "helper-1-py3-none-any.whl"
    kept = helper.read_bytes()
    helper.unlink()  # it is a link, which the next lines would write through
    missing = install(bundle, tmp_path / "site")
    helper.write_bytes(kept[:-1] + b"x")
    changed = install(bundle, tmp_path / "site")
    helper.write_bytes(kept)
    (bundle / "wheelhouse" / "helper-2-py3-none-any.whl").write_bytes(kept)
    slipped = install(bundle, tmp_path / "site")
    (bundle / "SHA256SUMS").unlink()
    unlisted = install(bundle, tmp_path / "site")
    assert {done.returncode for done in (missing, changed, slipped, unlisted)} == {2}
    for done in (missing, changed):
        assert "wheelhouse/helper-1" in done.stderr and "missing or were changed" in done.stderr
        assert "fedloom-" not in done.stderr
    assert "helper-2" in slipped.stderr and "not of this bundle" in slipped.stderr
    assert "SHA256SUMS is missing" in unlisted.stderr and not (tmp_path / "site").exists()


def test_the_script_says_which_machine_it_needs(fed, tmp_path):
    other = Asked(tuple(parse_targets(["linux-aarch64", "macos-arm64"], ["3.31"])))
    bundle = write_bundles(fed, ["bank"], other)[0].folder
    done = install(bundle, tmp_path / "site")
    assert done.returncode == 2 and "glibc 2.28 or newer, Python 3.31" in done.stderr
    assert "is Python 3." in done.stderr and "federation bundle --platform" in done.stderr
    assert not (tmp_path / "site").exists()


def stand_in(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_script_tells_a_lack_of_room_of_modules_and_of_a_path(fed, tmp_path):
    bundle, programs = write_bundles(fed, ["bank"], HERE)[0].folder, tmp_path / "programs"
    stand_in(programs, "df", "echo head; echo /dev/x 9 9 2048 9 /")
    full = install(bundle, tmp_path / "site", PATH=f"{programs}:{os.environ['PATH']}")
    assert full.returncode == 2 and "has 2 MiB of room, 64 are needed" in full.stderr
    stand_in(programs, "bare", f'case "$2" in -c) exit 1 ;; esac; exec {sys.executable} "$@"')
    bare = install(bundle, tmp_path / "site", PYTHON=str(programs / "bare"))
    assert bare.returncode == 2 and "lacks the modules venv and ensurepip" in bare.stderr
    blank = install(bundle, tmp_path / "a site")
    assert blank.returncode == 2 and "systemd units need a path" in blank.stderr
    foreign = tmp_path / "foreign" / "venv"
    foreign.mkdir(parents=True)
    assert "is not of this script" in install(bundle, foreign.parent).stderr and not list(foreign.iterdir())


def test_the_script_installs_and_does_nothing_twice(fed, tmp_path):
    """With a wheel that stands for fedloom: its command says how it was called, and fails as often as it is told to."""
    bundle, target = write_bundles(fed, ["bank"], HERE, str(MODEL))[0].folder, tmp_path / "site"
    first = install(bundle, target, DOCTOR="1", PIP_INDEX_URL="http://127.0.0.1:9/", PYTHONPATH="/nowhere")
    assert first.returncode == 1, first.stderr
    assert (
        f"doctor asked: federation doctor {target} --offline" in first.stdout and "mend what the doctor" in first.stdout
    )
    assert (target / "node.key").stat().st_mode & 0o777 == 0o600
    assert os.access(target / "supernode.sh", os.X_OK) and base_digest(target / "model") == base_digest(MODEL)
    unit = (target / "fedloom-worker.service").read_text()
    assert f"ExecStart={target}/venv/bin/fedloom worker {target}/SITE.toml\n" in unit and str(fed) not in unit
    assert f"Environment=PATH={target}/venv/bin:/usr/bin:/bin\n" in unit
    (target / "SITE.toml").write_text('name = "mine"\n')
    installed = (target / "venv" / "bin" / "fedloom").stat().st_mtime_ns
    again = install(bundle, target)
    assert again.returncode == 0 and "is installed in" in again.stdout
    assert (target / "SITE.toml").read_text() == 'name = "mine"\n'
    assert "left as they are: SITE.toml (compare" in again.stdout and "mend what" not in again.stdout
    assert (target / "venv" / "bin" / "fedloom").stat().st_mtime_ns == installed


def invoke(*arguments):
    done = CliRunner().invoke(cli.app, ["federation", *map(str, arguments)])
    return done.exit_code, " ".join((done.output + str(done.exception or "")).split())


ADDRESS = ["--address", "localhost:8443", "--site", "bank"]


def test_init_and_add_make_bundles_too(tmp_path, pip):
    fed = tmp_path / "fed"
    code, said = invoke("init", fed, *ADDRESS, "--bundle", "--platform", "linux-x86_64", "--platform", "macos-arm64")
    assert code == 0 and f"wrote {fed}/bundles/bank" in said and "./install.sh" in said
    assert invoke("add", fed, "lab", "--bundle")[0] == 0 and (fed / "bundles" / "lab" / "site" / "node.key").is_file()
    assert invoke("bundle", fed, "lab", "--python", "3.12", "--find-links", tmp_path, "--extra", "privacy")[0] == 0
    last = pip.calls("download")[-1]
    assert f"--find-links={tmp_path}" in last and "--python-version=3.12" in last and last[-1] == "helper==1"


def test_a_wrong_platform_stops_before_anything_is_written_and_pips_failure_after_it(tmp_path, monkeypatch):
    code, said = invoke("init", tmp_path / "fed", *ADDRESS, "--bundle", "--platform", "amiga")
    assert code != 0 and "expected one of linux-x86_64" in said and not (tmp_path / "fed").exists()
    monkeypatch.setattr(wheelhouse, "PIP", StandIn(tmp_path / "pip", stderr="ERROR: NewConnectionError").command)
    code, said = invoke("init", tmp_path / "fed", *ADDRESS, "--bundle")
    assert code != 0 and "their bundles are not" in said and "no package index can be reached" in said
    assert (
        f"fedloom federation bundle {tmp_path}/fed" in said
        and (tmp_path / "fed" / "sites" / "bank" / "node.key").is_file()
    )


def no_network():
    """The words before a command that take its network away; nothing where this machine does not allow that."""
    words = ["unshare", "--map-root-user", "--net"]
    tried = shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if tried else []


@pytest.mark.slow
def test_a_real_bundle_is_installed_where_there_is_no_network(tmp_path):
    """With the versions that are installed here; the doctor of the installation finds nothing to mend."""
    if not (alone := no_network()):
        pytest.skip("this machine lets nobody make a network namespace (unshare --map-root-user --net)")
    write_federation(tmp_path / "fed", ASKED, ["bank", "lab"])
    began = time.monotonic()
    try:
        bundle = write_bundles(tmp_path / "fed", [], HERE, str(MODEL))[0]
    except ConfigError as error:
        if "no package index can be reached" in str(error):
            pytest.skip(str(error))
        raise
    made = time.monotonic()
    code = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
    tried = subprocess.run([*alone, sys.executable, "-c", code], capture_output=True, text=True)
    assert "Network is unreachable" in tried.stderr
    plain = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG")} | {"COLUMNS": "200"}
    command = [*alone, bundle.folder / "install.sh", tmp_path / "site"]
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    print(f"{done.stdout}{done.stderr}")
    print(f"{bundle.bytes / 1e6:.0f} MB; made in {made - began:.0f} s, installed in {time.monotonic() - made:.0f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as the federation's" in done.stdout and "1800 examples" in done.stdout
    assert not re.search(r"^\s*fail\b", done.stdout, re.MULTILINE)
    assert read_plan(tmp_path / "site").model_digest == ASKED.model_digest
    versions = subprocess.run(
        [*alone, tmp_path / "site" / "venv" / "bin" / "pip", "check"], env=plain, capture_output=True, text=True
    )
    assert versions.returncode == 0, versions.stdout
