"""How a federation's run ends: said by the last row of its ledger, its log, its metrics and `fedloom status`."""

from __future__ import annotations

import json
import socket
import ssl
import threading

import desks
import pytest

from fedloom.deploy import federation
from fedloom.errors import CheckpointError, RoundError
from fedloom.flower import sites
from fedloom.flower.control import certificate_ends
from fedloom.flower.launch import SILENT, RunState, explain_end
from fedloom.records.ledger import Presence, read_rows
from fedloom.records.sections.flower import FlowerSettings
from fedloom.records.session import End
from fedloom.report.standing import read_run

pytestmark = pytest.mark.flower


def lost(node, ask, round, reply):
    return desks.LOST if ask == "turn" and round == 2 else None if ask == "never" else reply


def test_a_run_with_too_few_sites_says_so_wherever_it_is_looked_at(toy_federation, tmp_path):
    with pytest.raises(RoundError, match="round 2"):
        toy_federation("flower.deadline=0.2", "flower.retries=0", disturb=lost)
    run = tmp_path / "run"
    rows, standing = read_run(run)
    end = rows[-1]
    assert isinstance(end, End) and (end.status, end.round) == ("failed", 2) and "flower.min_replies is" in end.reason
    assert (standing.state, standing.rounds, standing.reason) == ("failed", 1, end.reason)
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert (last["level"], last["event"], last["reason"]) == ("error", "end", end.reason)
    metrics = (run / "metrics.prom").read_text()
    assert 'fedloom_run_state{run="run",method="fedsrd",state="failed"} 1' in metrics
    assert 'fedloom_rounds_done_total{run="run",method="fedsrd"} 1' in metrics
    assert any(isinstance(row, Presence) for row in rows) and 'fedloom_site_online{run="run"' in metrics


def test_a_run_that_cannot_be_set_up_again_says_why(toy_federation, tmp_path, monkeypatch):
    with pytest.raises(RoundError):
        toy_federation("flower.deadline=0.2", "flower.retries=0", disturb=lost)

    def broken(path):
        raise CheckpointError("the base model is gone")

    monkeypatch.setattr(sites, "base_digest", broken)
    with pytest.raises(CheckpointError, match="is gone"):
        toy_federation("flower.deadline=0.2", "flower.retries=0", resume=True)
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    assert [row.reason for row in rows if isinstance(row, End)][-1] == "the base model is gone"


def test_a_killed_app_is_explained_and_what_the_ledger_says_comes_first():
    killed = RunState("finished", "failed", SILENT, 0, 0)
    assert "was killed" in explain_end(killed)
    assert explain_end(killed, End(1, "failed", "the true reason")) == "the true reason"
    assert "fedloom stop" in explain_end(RunState("finished", "stopped", "", 0, 0), End(1, "interrupted"))
    assert explain_end(RunState("finished", "failed", "", 0, 0)) == "the SuperLink gives no reason"
    assert "\x1b" not in explain_end(RunState("finished", "failed", "\x1b[2J", 0, 0))


def test_a_run_learns_when_the_certificates_end(tmp_path):
    plan = federation.FederationPlan(address="127.0.0.1:1", listen="127.0.0.1:1", model="m", data="d", days=100)
    federation.write_federation(tmp_path / "fed", plan, ["lab"])
    held = tmp_path / "fed" / "server"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(held / "server.pem", held / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        line, _ = listener.accept()
        with context.wrap_socket(line, server_side=True) as secured:
            secured.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    port = listener.getsockname()[1]
    rules = FlowerSettings(superlink=f"127.0.0.1:{port}", root_certificates=str(held / "ca.pem"))
    ends = certificate_ends(rules)
    thread.join()
    listener.close()
    assert ends.keys() == {"server", "ca"} and ends["server"] < ends["ca"] and ends["server"].endswith("+00:00")
    assert certificate_ends(rules).keys() == {"ca"}, "nobody listens there any more"
    assert certificate_ends(FlowerSettings(insecure=True)) == {}
