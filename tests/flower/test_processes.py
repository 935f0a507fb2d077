"""Real processes, TLS, node keys: kill -9 anywhere, and the run ends with the bits of an undisturbed one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import httpx
import psutil
import pytest
from benchmarks.loopback import free_ports, until
from flwr.proto.control_pb2 import UnregisterNodeRequest
from processes import SITES, STRANGER, Processes

from fedloom.flower import launch
from fedloom.flower.nodes import list_nodes
from fedloom.records.ledger import Note, Training, Transfer, read_rows
from fedloom.server.local import run_local

pytestmark = pytest.mark.flower


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(tmp_path_factory.mktemp("f"))
    try:
        processes.everything(processes.settings(), SITES)
        yield processes
    finally:
        processes.close()


@pytest.fixture(scope="module")
def undisturbed(federation: Processes, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """rounds → the local engine's run with the same settings: everybody answers in every round."""

    @cache
    def played(rounds: int) -> Path:
        folder = tmp_path_factory.mktemp("local") / "run"
        run_local(federation.settings(rounds), folder)
        return folder

    return played


def same(one: Path, other: Path) -> None:
    """The same adapter and, whatever was sent twice, the same payloads."""
    file = "adapter/adapter_model.safetensors"
    assert (one / file).read_bytes() == (other / file).read_bytes()
    payloads = [{path.name: path.read_bytes() for path in (run / "payloads").iterdir()} for run in (one, other)]
    assert payloads[0] == payloads[1]


def trained_once_a_round(federation: Processes, out: Path, rounds: int) -> None:
    """No turn is in a site's own ledger twice."""
    job = (out / "job").read_text()
    for site in SITES:
        rows = read_rows(federation.folder / "fed/sites" / site / "state/jobs" / job / "ledger.jsonl")
        assert [row.round for row in rows if isinstance(row, Training)] == [*range(1, rounds + 1)], site


def during(ended: list[object], condition: Callable[[], object], what: str) -> None:
    """Wait for something in a run that goes on meanwhile."""
    until(lambda: ended or condition(), what)
    assert not ended, ended[0]


def ended_well(ended: list[object]) -> None:
    until(lambda: ended, "the end of the run")
    assert isinstance(ended[0], launch.RunState), ended[0]


def test_a_worker_killed_mid_step_costs_nothing_but_time(
    federation: Processes, undisturbed: Callable[[int], Path], tmp_path: Path
):
    ended = federation.submit(tmp_path / "run", rounds=2)
    during(ended, lambda: federation.said("worker-lab", "round 2: training"), "the second round")
    federation.kill("worker-lab")
    assert federation.said("worker-lab", "turn answered") == 1, "the kill came after the step"
    federation.worker("lab")
    ended_well(ended)
    same(tmp_path / "run", undisturbed(2))
    trained_once_a_round(federation, tmp_path / "run", 2)


def test_who_is_not_registered_or_does_not_speak_tls_is_refused(federation: Processes):
    stranger = federation.supernode(STRANGER)
    plain = federation.start(
        "plain", "flower-supernode", "--insecure", "--superlink", federation.address, "--max-retries", "1",
        "--port", str(free_ports(1)[0]),
    )  # fmt: skip
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"http://{federation.address}/v1/fleet/pull-messages", timeout=20)
    until(lambda: stranger.poll() is not None and plain.poll() is not None, "the end of both")
    assert stranger.returncode != 0 and plain.returncode != 0
    assert federation.said(f"node-{STRANGER}", "Failed to initialize the connection")
    assert not federation.said("plain", "SuperNode ID")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["node", "supernode", "serverapp", "superlink"])
def test_kill_anything_and_the_run_ends_with_the_same_bits(
    federation: Processes,
    undisturbed: Callable[[int], Path],
    tmp_path: Path,
    victim: str,
    capsys: pytest.CaptureFixture,
):
    if victim == "supernode":  # the other way in, beside a site that has the usual one
        assert federation.stop("node-depot") == 0
        federation.supernode("depot")
    began, out = time.monotonic(), tmp_path / "run"
    ended = federation.submit(out)
    kill = {"node": kill_node, "supernode": kill_node, "serverapp": kill_serverapp, "superlink": kill_superlink}
    outcome = kill[victim](federation, out, ended)
    ended_well(outcome)
    same(out, undisturbed(3))
    trained_once_a_round(federation, out, 3)
    with capsys.disabled():
        print(f"\n{victim} killed: the same adapter and payloads after {time.monotonic() - began:.0f} s")


@pytest.mark.slow
def test_a_server_killed_within_a_secure_sum_goes_on_with_that_very_sum(federation: Processes, tmp_path: Path):
    secret = ["method.name=fedit", "privacy.secure_aggregation=true", "privacy.least_cohort=2"]
    out, journal = tmp_path / "run", tmp_path / "run" / "secure-sum"
    ended = federation.submit(out, *secret, rounds=2)
    during(ended, lambda: journal.exists() and b'"rests_on": "2 ' in journal.read_bytes(), "the second round's sum")
    app = federation.child("superlink", "flwr-serverapp")
    assert app is not None
    app.kill()
    until(lambda: gone(app), "the server app's end")
    assert journal.exists() and not (out / "checkpoints/round-00002.safetensors").exists()
    ended_well(federation.submit(out, *secret, resume=True, rounds=2))
    run_local(federation.settings(2, *secret), tmp_path / "local")
    file = "adapter/adapter_model.safetensors"
    assert (out / file).read_bytes() == (tmp_path / "local" / file).read_bytes()
    notes = [row.text for row in read_rows(out / "ledger.jsonl") if isinstance(row, Note)]
    assert not [text for text in notes if "skipped" in text or "refused" in text]
    audit = (federation.folder / "fed/sites/lab/state/audit/audit.jsonl").read_text()
    assert audit.count((out / "job").read_text()) >= 2, "every masked vector is on record"


@pytest.mark.slow
def test_a_slow_site_is_withdrawn_while_it_trains_and_is_charged_nothing(federation: Processes, tmp_path: Path):
    """Its training would take minutes. Each round closes without it, and it is asked again in the next."""
    out, stopped = tmp_path / "run", federation.said("worker-lab", "the turn was dropped: withdrawn")
    slow = ["clients.lab.max_steps=100000", "flower.min_replies=1", "flower.grace=1"]
    ended = federation.submit(out, *slow, rounds=2)
    ended_well(ended)
    until(lambda: federation.said("worker-lab", "the turn was dropped: withdrawn") > stopped, "the withdrawal")
    job = (out / "job").read_text()
    rows = read_rows(federation.folder / "fed/sites/lab/state/jobs" / job / "ledger.jsonl")
    assert not [row for row in rows if isinstance(row, Training)]
    assert {row.direction for row in rows if isinstance(row, Transfer)} <= {"down"}  # the result, once it was delivered
    audit = federation.folder / "fed/sites/lab/state/audit/audit.jsonl"
    assert not audit.exists() or job not in audit.read_text()


@pytest.mark.slow
def test_a_node_that_is_not_registered_or_is_revoked_says_so_and_ends(federation: Processes):
    stranger = federation.node(STRANGER)
    until(lambda: federation.said("node-lab", "connected to the SuperLink"), "the node")
    with launch.open_control(federation.settings()) as client:
        lab = next(node for node in list_nodes(client) if node.name == "lab")
        client.UnregisterNode(UnregisterNodeRequest(node_id=lab.node_id))
    assert federation.started["node-lab"].wait(60) == 77
    assert federation.said("node-lab", "does not know this site's key, or no more") == 1
    assert stranger.wait(120) == 77
    assert federation.said(f"node-{STRANGER}", "error: the SuperLink does not let this site in") == 1


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill_node(federation: Processes, out: Path, ended: list[object]) -> list[object]:
    """Mid-round. Flower lets a SuperNode back in once it has missed its heartbeats, after up to a minute."""
    start = federation.supernode if federation.child("node-depot", "flower-supernode") else federation.node
    before = federation.said("worker-depot", "round 2: training")
    during(ended, lambda: federation.said("worker-depot", "round 2: training") > before, "the second round")
    federation.kill("node-depot")

    def back() -> bool:
        process = federation.started.get("node-depot")
        if process is None or process.poll() is not None:
            start("depot")
        return bool(ended)

    until(back, "the end of the run")
    return ended


def kill_serverapp(federation: Processes, out: Path, ended: list[object]) -> list[object]:
    """After round 2; the run is submitted again."""
    during(ended, (out / "checkpoints/round-00002.safetensors").exists, "the second round")
    app = federation.child("superlink", "flwr-serverapp")
    assert app is not None and not (out / "adapter").exists()
    app.kill()
    until(lambda: gone(app), "the server app's end")
    return federation.submit(out, resume=True)


def kill_superlink(federation: Processes, out: Path, ended: list[object]) -> list[object]:
    """After round 1, and with it the server app; both come back."""
    during(ended, (out / "checkpoints/round-00001.safetensors").exists, "the first round")
    app = federation.child("superlink", "flwr-serverapp")
    assert app is not None
    federation.kill("superlink")
    until(lambda: gone(app), "the server app's end")
    until(lambda: not federation.listening(), "the SuperLink's end")
    federation.superlink()
    return federation.submit(out, resume=True)
