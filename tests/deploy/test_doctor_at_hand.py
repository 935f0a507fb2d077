"""The doctor sees what it must, versions that do not fit and proxies in the way, and loads no torch for it."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest

from fedloom.deploy import network, versions
from fedloom.deploy.doctor import check_worker, examine
from fedloom.deploy.federation import FederationPlan, read_plan, write_federation
from fedloom.flower.proxies import exempt_loopback
from fedloom.site.protocol import SPOKEN, WRONG_TOKEN, Parcel
from pretend_superlink import serving

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def made(tmp_path):
    asked = FederationPlan(
        address="localhost:8443",
        listen="127.0.0.1:8443",
        model=str(TESTBED / "model"),
        data=str(TESTBED / "data" / "{site}" / "train.jsonl"),
    )
    write_federation(tmp_path / "fed", asked, ["bank", "lab"])
    return tmp_path / "fed"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def by_name(checks):
    return {check.what: check for check in checks}


def test_the_doctor_loads_neither_torch_nor_transformers(made):
    code = f"""
import sys
from pathlib import Path
from fedloom.deploy.doctor import check_worker, examine
for path in ("sites/lab", "server"):
    found = examine(Path({str(made)!r}) / path)
assert {{"model", "SuperLink 127.0.0.1:8443"}} <= {{check.what for check in found}}
print(sorted({{"torch", "transformers", "numpy", "flwr"}} & set(sys.modules)))
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout == "[]\n"


def test_every_line_stands_there_once(made):
    for folder in ("sites/lab", "server"):
        counts = Counter(check.what for check in examine(made / folder, online=False))
        assert set(counts.values()) == {1} and counts["flwr"] == counts["cryptography"] == 1


def stated(monkeypatch, **told):
    real = versions.metadata.version
    monkeypatch.setattr(versions.metadata, "version", lambda name: told.get(name) or real(name))


def test_another_minor_version_of_flwr_fails_here_and_at_the_server(monkeypatch):
    stated(monkeypatch, flwr="1.42.3")
    here = by_name(versions.check_versions(("torch", "flwr")))["flwr"]
    assert here.outcome == "fail" and '"flwr<1.42,>=1.41"' in here.advice
    (there,) = versions.check_superlink_version("1.41.0")
    assert there.outcome == "fail" and "1.41.0" in there.found and "1.42.3" in there.found
    stated(monkeypatch, flwr="1.41.7")
    assert by_name(versions.check_versions(("flwr",)))["flwr"].outcome == "ok"
    assert versions.check_superlink_version("1.41.0")[0].outcome == "ok"


def test_a_package_that_is_listed_but_gone_is_found(monkeypatch):
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    assert by_name(versions.check_versions(("torch",)))["torch"].outcome == "fail"


def test_the_tested_version_of_flwr_is_the_one_that_the_package_asks_for():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    above = f"<1.{int(versions.FLWR.partition('.')[2]) + 1}"
    assert f"flwr>={versions.FLWR},{above}" in text and f"flwr[simulation]>={versions.FLWR},{above}" in text


def test_what_the_federation_was_set_up_with_is_compared(made, monkeypatch):
    plan = read_plan(made / "sites" / "lab")
    assert plan.flwr.startswith(f"{versions.FLWR}.") and plan.fedloom
    assert versions.check_noted(plan.flwr, plan.fedloom) == versions.check_noted("", "") == []
    stated(monkeypatch, fedloom="7.0.0")
    noted = by_name(examine(made / "sites" / "lab", online=False))["fedloom noted"]
    assert noted.outcome == "warn" and "7.0.0" in noted.found and plan.fedloom in noted.found


class SuperLink(http.server.BaseHTTPRequestHandler):
    """Says what a SuperLink says of itself."""

    description: ClassVar[bytes] = b""

    def do_GET(self):
        body = self.description if self.path == "/openapi.json" else b""
        self.send_response(200 if body else 404 if self.path == network.FLEET else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def superlink(made):
    kind = type("Pretending", (SuperLink,), {})
    with serving(kind, made / "server") as port:
        yield kind, port


def described(version, title="SuperLink API"):
    return json.dumps({"info": {"title": title, "version": version}}).encode()


@pytest.mark.parametrize(
    ("description", "outcome", "words"),
    [
        (described(f"{versions.FLWR}.9"), "ok", f"has {versions.FLWR}.9"),
        (described("1.39.0"), "fail", "1.39.0"),
        (described("1.39.0", "another API"), "ok", "not told"),
        (b"", "ok", "not told"),
        (b"[" * 100_000, "ok", "not told"),
        (b'{"info": []}', "ok", "not told"),
    ],
)
def test_the_superlink_is_asked_for_its_version(made, superlink, description, outcome, words):
    kind, port = superlink
    kind.description = description
    check = by_name(network.check_superlink("localhost", port, made / "ca" / "ca.pem"))["flwr there"]
    assert check.outcome == outcome and words in check.found


def test_a_real_superlink_says_its_version_where_it_is_asked():
    pytest.importorskip("flwr", reason="the extra `flower` is not installed")
    from superlinks import control_client

    answer = control_client()._client.get(f"https://in-process{network.DESCRIPTION}")
    assert network._version_in(iter([answer.content])) == versions.metadata.version("flwr")


class Tunnel(threading.Thread):
    """A proxy that knows CONNECT; it counts what it is asked for, and may refuse."""

    def __init__(self, refuse=b""):
        super().__init__(daemon=True)
        self.refuse, self.asked = refuse, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            try:
                caller, _ = self.listener.accept()
            except OSError:
                return
            head = caller.recv(4096)
            self.asked.append(head.split()[1].decode())
            if self.refuse:
                caller.sendall(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % self.refuse)
                caller.close()
                continue
            there = socket.create_connection(("127.0.0.1", int(head.split()[1].rpartition(b":")[2])))
            caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            for source, sink in ((caller, there), (there, caller)):
                threading.Thread(target=self.carry, args=(source, sink), daemon=True).start()

    @staticmethod
    def carry(source, sink):
        try:
            while piece := source.recv(65536):
                sink.sendall(piece)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()


def test_the_doctor_names_the_rules_that_were_set_and_no_others(made):
    path = made / "sites" / "lab" / "SITE.toml"
    text = path.read_text(encoding="utf-8")
    assert "policy: nothing is limited" in by_name(examine(path.parent, online=False))["SITE.toml"].found
    path.write_text(text.replace("[policy]", "[policy]\nmax_steps = 7", 1), encoding="utf-8")
    assert by_name(examine(path.parent, online=False))["SITE.toml"].found.endswith("policy: max_steps")
    path.write_text(text, encoding="utf-8")


def test_the_doctor_takes_the_way_through_the_proxy_as_the_node_does(made, superlink, monkeypatch):
    _, port = superlink
    tunnel = Tunnel()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{tunnel.port}")
    check = network.check_superlink("localhost", port, made / "ca" / "ca.pem")[0]
    assert check.outcome == "ok" and f"through the proxy http://127.0.0.1:{tunnel.port}" in check.found
    assert set(tunnel.asked) == {f"localhost:{port}"}
    before = len(tunnel.asked)
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert "proxy" not in network.check_superlink("localhost", port, made / "ca" / "ca.pem")[0].found
    assert len(tunnel.asked) == before
    tunnel.listener.close()


def test_a_proxy_that_refuses_is_named(made, superlink, monkeypatch):
    _, port = superlink
    tunnel = Tunnel(refuse=b"403 Forbidden")
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{tunnel.port}")
    (check,) = network.check_superlink("localhost", port, made / "ca" / "ca.pem")
    assert check.outcome == "fail" and "403" in check.found and f"CONNECT localhost:{port}" in check.advice
    tunnel.listener.close()


@pytest.mark.parametrize("name", ["127.0.0.1", "no-such-proxy.invalid"])
def test_a_proxy_that_is_not_there_is_named_and_not_the_superlink(made, superlink, monkeypatch, name):
    """It was said of the SuperLink that nobody listens there, or that its name cannot be resolved."""
    _, port = superlink
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = listener.getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://anna:geheim@{name}:{gone}")
    (check,) = network.check_superlink("localhost", port, made / "ca" / "ca.pem")
    assert check.outcome == "fail" and f"the proxy http://{name}:{gone} cannot be reached" in check.found
    assert "HTTPS_PROXY" in check.advice and "NO_PROXY" in check.advice and "geheim" not in check.found


def test_a_proxy_s_password_is_asked_for_and_never_shown(made, superlink, monkeypatch):
    _, port = superlink
    tunnel = Tunnel(refuse=b"407 Proxy Authentication Required")
    monkeypatch.setenv("HTTPS_PROXY", f"http://anna:geheim@127.0.0.1:{tunnel.port}")
    (check,) = network.check_superlink("localhost", port, made / "ca" / "ca.pem")
    assert check.outcome == "fail" and "wants a user and a password: 407" in check.found
    assert "HTTPS_PROXY=http://USER:PASSWORD@" in check.advice
    told = network.check_proxies(made / "sites" / "lab" / "supernode.sh")
    assert told.found == f"https: http://127.0.0.1:{tunnel.port}" and "geheim" not in check.found
    tunnel.listener.close()


def test_a_proxy_for_all_is_found_where_it_would_stop_flower(made, monkeypatch):
    script = made / "sites" / "lab" / "supernode.sh"
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    assert network.check_proxies(script).outcome == "ok"  # it takes loopback out by itself
    script.write_text("exec flower-supernode\n")  # as earlier versions wrote it
    check = by_name(examine(made / "sites" / "lab", online=False))["proxy"]
    assert check.outcome == "fail" and "export NO_PROXY=127.0.0.1,localhost,::1 " in check.advice
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    assert network.check_proxies(script).outcome == "ok"


@pytest.mark.parametrize("told", ["", "fed.example.org, 127.0.0.1", "*"])
def test_loopback_is_taken_out_of_the_proxy_and_the_rest_stays(monkeypatch, told):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, told)
    exempt_loopback()
    names = os.environ["NO_PROXY"].split(",")
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] and len(set(names)) == len(names)
    assert {"127.0.0.1", "localhost", "::1", *filter(None, (name.strip() for name in told.split(",")))} == set(names)


@pytest.mark.parametrize(
    ("facts", "outcome", "words"),
    [
        ({"error": WRONG_TOKEN}, "fail", "refuses the token"),
        ({"error": "no request", "protocol": SPOKEN.newest}, "ok", "takes the token"),
        ({"error": "no request", "protocol": SPOKEN.newest - 1}, "warn", f"protocol {SPOKEN.newest - 1}"),
        (None, "warn", "busy"),
    ],
)
def test_a_worker_is_asked_for_token_and_protocol(tmp_path, monkeypatch, facts, outcome, words):
    (tmp_path / "worker.token").write_text("secret")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        if facts is None:  # a worker that trains

            def late(*arguments):
                raise TimeoutError

            monkeypatch.setattr("fedloom.site.protocol.exchange", late)
        else:
            monkeypatch.setattr("fedloom.site.protocol.exchange", lambda *arguments: Parcel(facts))
        check = check_worker(tmp_path / "sock", str(tmp_path / "worker.token"))
    assert check.outcome == outcome and words in check.found


def test_the_way_out_is_the_one_that_the_site_names(made):
    """`fedloom node` goes by [node] of SITE.toml, so the doctor does as well."""
    site = made / "sites" / "lab"
    for name in ("node.key", "node.pub", "ca.pem"):
        (site / name).rename(site / f"own-{name}")
    (site / "federation.toml").unlink()
    (site / "supernode.sh").unlink()
    file = site / "SITE.toml"
    told = file.read_text().replace('"./node.key"', '"./own-node.key"').replace('"./ca.pem"', '"./own-ca.pem"')
    file.write_text(told.replace('superlink = "localhost:8443"', 'superlink = "127.0.0.1:1"'))
    found = by_name(examine(site))
    assert found["own-node.key"].outcome == found["own-ca.pem"].outcome == "ok" and "proxy" not in found
    assert "nobody listens" in found["SuperLink 127.0.0.1:1"].found
