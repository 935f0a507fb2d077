"""What the scripts and units of a federation do, with stand-ins for Flower's programs."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fedloom.cli.node import NEEDS_SOMEBODY
from fedloom.deploy.federation import FederationPlan, write_federation
from fedloom.errors import ConfigError

ASKED = FederationPlan(address="localhost:8443", listen="127.0.0.1:8443")


def made(folder, **more):
    write_federation(folder, ASKED.model_copy(update=more), ["bank", "lab"])
    return folder


def program(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(("ended", "code"), [(0, 77), (1, 1), (137, 137)])
def test_a_node_that_flower_ended_by_itself_is_a_failure(tmp_path, ended, code):
    """Flower ends a SuperNode whose key was revoked with 0, "gracefully"; systemd would start it again for ever."""
    environment = program(tmp_path / "programs", "flower-supernode", f"exit {ended}")
    script = made(tmp_path / "fed") / "sites" / "lab" / "supernode.sh"
    done = subprocess.run([script], env=environment, capture_output=True, text=True)
    assert done.returncode == code and ("federation doctor" in done.stderr) == (ended == 0)


def started(tmp_path):
    says = 'echo $$ > "$FLWR_HOME/pid"; trap "exit 0" TERM; while :; do sleep 0.05; done'
    environment = program(tmp_path / "programs", "flower-supernode", says)
    site = made(tmp_path / "fed") / "sites" / "lab"
    process = subprocess.Popen([site / "supernode.sh"], env=environment)
    while not (site / "flwr" / "pid").is_file() or not (site / "flwr" / "pid").read_text().strip():
        time.sleep(0.01)
    return process, int((site / "flwr" / "pid").read_text())


def gone(pid):
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
            return True
        time.sleep(0.01)
    return False


def test_a_node_that_is_told_to_stop_stops_and_that_is_no_failure(tmp_path):
    process, node = started(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0 and gone(node)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed")
def test_a_node_does_not_outlive_its_script(tmp_path):
    process, node = started(tmp_path)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL and gone(node)


@pytest.mark.parametrize(
    ("script", "flower"), [("server/superlink.sh", "superlink"), ("sites/lab/supernode.sh", "supernode")]
)
def test_loopback_never_goes_through_a_proxy_and_tasks_are_not_waited_for(tmp_path, script, flower):
    environment = program(tmp_path / "programs", f"flower-{flower}", 'env > "$FLWR_HOME/env"')
    path = made(tmp_path / "fed") / script
    (path.parent / "flwr").mkdir(exist_ok=True)
    subprocess.run(
        [path], env={**environment, "HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "intranet"}, capture_output=True
    )
    told = dict(line.split("=", 1) for line in (path.parent / "flwr" / "env").read_text().splitlines() if "=" in line)
    assert told["NO_PROXY"] == told["no_proxy"] == "intranet,127.0.0.1,localhost,::1"
    assert told["HTTP_PROXY"] == "http://proxy:3128"
    assert 0.01 <= float(told["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]) < 0.5  # what flwr 1.41 allows; its own is 1 s


def test_two_federations_on_one_machine_have_nothing_in_common(tmp_path):
    one, two = made(tmp_path / "one"), made(tmp_path / "two", name="two", node_port=9194, listen="127.0.0.1:8444")
    told = {}
    for folder in (one, two):
        site = folder / "sites" / "lab"
        units = {path.name for path in [*site.glob("*.service"), *(folder / "server").glob("*.service")]}
        text = "".join(path.read_text() for path in site.glob("*.service")) + (site / "SITE.toml").read_text()
        users = set(re.findall(r"^User=(\S+)", text, re.MULTILINE)) | set(re.findall(r'socket_group = "(\S+)"', text))
        ports = set(re.findall(r"--port (\d+)", (site / "supernode.sh").read_text()))
        told[folder] = units, users, ports
    assert all(not first & second for first, second in zip(told[one], told[two], strict=True))
    assert told[one] == (
        {f"fedloom-{name}.service" for name in ("worker", "supernode", "node", "superlink")},
        {"fedloom-site", "fedloom-node"},
        {"9095"},
    )
    assert told[two][0] == {name.replace("fedloom-", "fedloom-two-") for name in told[one][0]}
    unit = (two / "sites" / "lab" / "fedloom-two-supernode.service").read_text()
    assert "After=network-online.target time-sync.target fedloom-two-worker.service" in unit
    assert "enable --now fedloom-two-supernode" in unit


@pytest.mark.parametrize("more", [{"name": "Two"}, {"name": "a" * 17}, {"name": "-"}, {"node_port": 80}])
def test_a_name_that_no_user_can_have_and_a_port_that_is_not_ours_are_refused(tmp_path, more):
    with pytest.raises(ConfigError, match="--name|--node-port"):
        made(tmp_path / "fed", **more)
    assert not (tmp_path / "fed").exists()


def test_units_do_not_start_again_what_cannot_work(tmp_path):
    site = made(tmp_path / "fed") / "sites" / "lab"
    worker, node = (site / f"fedloom-{name}.service" for name in ("worker", "supernode"))
    assert (
        "RestartPreventExitStatus=2\n" in worker.read_text() and "Type=notify\nWatchdogSec=60\n" in worker.read_text()
    )
    assert "TimeoutStartSec=900\n" in worker.read_text(), "killed after 90 s while it loads its libraries, for ever"
    light = (site / "fedloom-node.service").read_text()
    assert "Type=notify\nTimeoutStartSec=infinity\nWatchdogSec=60\n" in light and f"node {site}/SITE.toml\n" in light
    assert f"RestartPreventExitStatus={NEEDS_SOMEBODY}\n" in light and NEEDS_SOMEBODY == 77
    assert "RestartPreventExitStatus=77\n" in node.read_text() and "exit 77" in (site / "supernode.sh").read_text()
    for unit in (tmp_path / "fed").rglob("*.service"):
        assert "StartLimitBurst=" in unit.read_text().partition("[Service]")[0]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_reads_the_units(tmp_path):
    units = sorted(made(tmp_path / "fed", name="two").rglob("*.service"))
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    names = [unit.name for unit in units]
    # Programs and users of this machine are not there; that is no matter of the files.
    told = [line for line in done.stderr.splitlines() if any(name in line for name in names)]
    assert len(names) == 7 and not [line for line in told if "not executable" not in line and "not found" not in line]
