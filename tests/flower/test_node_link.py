"""The node's way to the SuperLink: what is waited for, what ends it, and with which words. The replies are made up."""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest
from flwr.proto import fleet_pb2 as fleet
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.run_pb2 import GetRunResponse, Run
from flwr.supercore.constant import VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY
from flwr.supercore.error import ApiErrorCode

from fedloom.cli import node as command
from fedloom.deploy.certificates import certificate_pem, new_ca, new_key, node_key_pair
from fedloom.errors import ConfigError, SiteError
from fedloom.flower.node import link as links
from fedloom.flower.node.link import Link, StoppedError
from fedloom.flower.node.refusals import NotLetInError, RunOver
from fedloom.flower.proxies import exempt_loopback
from fedloom.site.config import NodeSettings, load_site_config

pytestmark = pytest.mark.flower
NODE = 2**63 + 5
SUPERLINK = "fed.example.org:9443"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "node.key").write_bytes(node_key_pair(new_key())[0])
    (folder / "ca.pem").write_bytes(certificate_pem(new_ca(new_key(), "a CA")))
    return folder


@pytest.fixture
def settings(files: Path, tmp_path: Path, monkeypatch) -> NodeSettings:
    monkeypatch.setattr(links, "FIRST_PAUSE", 0.001)
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return NodeSettings(
        superlink=SUPERLINK,
        root_certificates=str(files / "ca.pem"),
        key=str(files / "node.key"),
        state=str(tmp_path),
    )


Answer = Callable[[str], httpx.Response]


def made(settings: NodeSettings, answer: Answer) -> tuple[Link, list[str]]:
    """A link whose requests `answer` gets by the last part of their path, and those paths in order."""
    link, asked = Link(settings, threading.Event()), []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path.rpartition("/")[2])
        return answer(asked[-1])

    link.client._client = httpx.Client(transport=httpx.MockTransport(handle))
    return link, asked


def ok(message: object = None) -> httpx.Response:
    return httpx.Response(200, content=b"" if message is None else message.SerializeToString())


def activated(path: str) -> httpx.Response:
    return ok(fleet.ActivateNodeResponse(node_id=NODE) if path == "activate-node" else None)


def flower_error(status: int, code: int, words: str = "words of Flower's") -> httpx.Response:
    return httpx.Response(status, json={"code": int(code), "detail": words})


def unauthorized(ahead: float = 0.0) -> httpx.Response:
    """What Flower says of a key that it does not know and of a clock that is `ahead` of its own."""
    date = formatdate(time.time() - ahead, usegmt=True)
    return httpx.Response(401, json={"detail": "Invalid SuperNode authentication"}, headers={"date": date})


def failing(error: Exception) -> Answer:
    def answer(path: str) -> httpx.Response:
        raise error

    return answer


def certificate_error(code: int) -> Exception:
    inner = ssl.SSLCertVerificationError("certificate verify failed")
    inner.verify_code, inner.verify_message = code, "self-signed certificate"
    outer = httpx.ConnectError("no way")
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("answer", "words", "needs_somebody"),
    [
        (lambda path: unauthorized(), "does not know this site's key", True),
        (lambda path: unauthorized(31), "clock is 3[0-2] s ahead of .* set the clock", True),
        (lambda path: unauthorized(-400), "clock is (399|400|401) s behind", True),
        (lambda path: flower_error(426, ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE), "install its flwr here", True),
        (lambda path: httpx.Response(404), "has no Fleet API", True),
        (lambda path: httpx.Response(407), "refuses this site: 407", True),
        (failing(certificate_error(10)), "has ended.*fedloom federation renew", False),
        (failing(certificate_error(9)), "not valid yet", False),
        (failing(certificate_error(62)), "for another name", False),
        (failing(certificate_error(19)), "not of this federation's CA", False),
    ],
)
def test_what_waiting_does_not_mend_ends_the_node_in_one_sentence(settings, answer, words, needs_somebody):
    link, _ = made(settings, answer)
    with pytest.raises(SiteError, match=words) as caught:
        link.join()
    assert isinstance(caught.value, NotLetInError) is needs_somebody


def test_a_superlink_that_is_away_is_waited_for_and_said_once(settings, caplog):
    replies = iter([httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.Response(502), None])

    def answer(path: str) -> httpx.Response:
        reply = next(replies)
        if isinstance(reply, Exception):
            raise reply
        return reply or activated(path)

    link, asked = made(settings, answer)
    with caplog.at_level("INFO"):
        link.join()
    assert asked == ["activate-node"] * 4
    assert [record.message.partition(" (")[0] for record in caplog.records if "SuperLink" in record.message] == [
        f"the SuperLink at {SUPERLINK} is away",
        "the SuperLink is back after 0 s",
        f"connected to the SuperLink at {SUPERLINK}",
    ]


def test_waiting_ends_when_the_node_is_told_to(settings):
    link, _ = made(settings, failing(httpx.ConnectError("refused")))
    threading.Timer(0.05, link.stop.set).start()
    with pytest.raises(StoppedError):
        link.join()


def test_a_node_that_was_killed_is_signed_off_before_the_next_signs_on(settings):
    link, asked = made(settings, activated)
    link.join()
    again, asked_again = made(settings, activated)
    again.join()
    assert asked == ["activate-node"] and asked_again == ["deactivate-node", "activate-node"]


def test_a_key_that_was_revoked_meanwhile_is_told_from_a_node_that_seems_to_run(settings):
    made(settings, activated)[0].join()
    answers = {
        "deactivate-node": lambda: unauthorized(),
        "activate-node": lambda: flower_error(400, ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED),
    }
    link, _ = made(settings, lambda path: answers[path]())
    with pytest.raises(NotLetInError, match="does not know this site's key.*federation register"):
        link.join()


def test_a_key_that_was_never_registered_is_waited_for_a_while(settings, monkeypatch):
    monkeypatch.setattr(links, "FORGOTTEN_SECONDS", 0.0)
    link, _ = made(settings, lambda path: flower_error(400, ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED))
    link.stop.wait = lambda seconds: None
    with pytest.raises(NotLetInError, match="its key is not registered.*or another node with this key"):
        link.join()


def test_another_minor_version_that_is_let_in_is_said_once(settings, caplog):
    def answer(path: str) -> httpx.Response:
        reply = activated(path)
        reply.headers[VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY] = "SuperLink 1.42.0, SuperNode 1.41.0"
        return reply

    link, _ = made(settings, answer)
    link.join()
    link.pull()
    told = [record.message for record in caplog.records if "another version" in record.message]
    assert len(told) == 1 and "1.42.0" in told[0]


def test_a_revoked_site_ends_at_its_next_look_or_sign_of_life(settings):
    link, _ = made(settings, activated)
    link.join()
    revoked, _ = made(settings, lambda path: unauthorized())
    link.client._client = revoked.client._client
    with pytest.raises(NotLetInError, match="or no more"):
        link.pull()
    link._next_beat = 0.0
    with pytest.raises(NotLetInError, match="or no more"):
        link.beat()


def test_a_sign_of_life_is_given_when_it_is_due(settings):
    link, asked = made(settings, lambda path: ok(SendNodeHeartbeatResponse(success=True)))
    link._next_beat = time.monotonic() + 60
    link.beat()
    assert asked == []
    link._next_beat = 0.0
    link.beat()
    link.beat()
    assert asked == ["send-node-heartbeat"]


def test_a_runs_settings_are_asked_for_once_and_no_bundle_ever(settings):
    told = Run()
    told.override_config["settings"].string = "x = 1"
    link, asked = made(settings, lambda path: ok(GetRunResponse(run=told)))
    assert [link.settings_of(1), link.settings_of(1)] == ["x = 1", "x = 1"] and asked == ["get-run"]
    older, _ = made(settings, lambda path: ok(GetRunResponse(run=Run())))
    assert older.settings_of(1) is None


def test_a_run_that_is_over_is_no_error_of_the_site(settings):
    link, _ = made(settings, lambda path: flower_error(403, ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED))
    with pytest.raises(RunOver):
        link.settings_of(1)


def test_a_proxy_carries_what_goes_out_and_nothing_of_this_machine(settings, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy, socket.create_server(("127.0.0.1", 0)) as near:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")
        exempt_loopback()
        assert first_bytes(proxy, settings).startswith(f"CONNECT {SUPERLINK} ".encode())
        local = settings.model_copy(update={"superlink": f"127.0.0.1:{near.getsockname()[1]}"})
        assert first_bytes(near, local)[:1] == b"\x16"  # TLS begins


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"403 Forbidden", "lets nothing through: 403 Forbidden; .* CONNECT"),
        (b"407 Who", "wants a user and a password: 407 Who; .*USER:PASSWORD@"),
        (b"", "cannot be reached: .*; .*check HTTPS_PROXY"),
    ],
)
def test_a_proxy_that_lets_nobody_through_is_named_and_not_the_superlink(settings, monkeypatch, caplog, answer, words):
    """The node said that the SuperLink was away."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        monkeypatch.setenv("HTTPS_PROXY", f"http://anna:geheim@127.0.0.1:{port}")
        link = Link(settings, threading.Event())
        if not answer:
            proxy.close()
        thread = threading.Thread(target=lambda: pytest.raises(StoppedError, link.join))
        thread.start()
        if answer:
            connection, _ = proxy.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % answer)
        while not caplog.text:
            link.stop.wait(0.01)
        link.stop.set()
    thread.join(30)  # what it asks next is refused, now that nobody listens
    assert not thread.is_alive()
    assert re.search(f"the proxy http://127.0.0.1:{port} {words}", caplog.text)
    assert "is away" not in caplog.text and "geheim" not in caplog.text


def first_bytes(listener: socket.socket, settings: NodeSettings) -> bytes:
    link = Link(settings, threading.Event())
    thread = threading.Thread(target=lambda: pytest.raises(StoppedError, link.join))
    thread.start()
    connection, _ = listener.accept()
    with connection:
        heard = connection.recv(200)
        link.stop.set()
    thread.join(30)
    return heard


@pytest.mark.parametrize(
    ("file", "words"),
    [("node.key", "node.key: .*no ECDSA key"), ("ca.pem", "node.root_certificates: .*cannot be used")],
)
def test_a_broken_key_or_certificate_is_named(settings, files, tmp_path, file, words):
    broken = tmp_path / file
    broken.write_text("-----BEGIN NONSENSE-----")
    key = "key" if file == "node.key" else "root_certificates"
    with pytest.raises(SiteError, match=words):
        Link(settings.model_copy(update={key: str(broken)}), threading.Event())
    with pytest.raises(SiteError, match=r"cannot be read|cannot be used"):
        Link(settings.model_copy(update={key: str(tmp_path / "none")}), threading.Event())


@pytest.mark.parametrize(("error", "code"), [(NotLetInError("no way"), 77), (SiteError("no way"), 2), (None, 0)])
def test_the_command_says_why_it_ends_in_one_line_and_by_its_exit_code(tmp_path, monkeypatch, capsys, error, code):
    ended = []

    def serve(site: object) -> None:
        if error:
            raise error

    monkeypatch.setattr("fedloom.flower.node.service.serve_node", serve)
    monkeypatch.setattr(command.os, "_exit", ended.append)
    (tmp_path / "SITE.toml").write_text('name = "a"\nmodel = "m"\ndata = "d"\n')
    command.run_node(tmp_path / "SITE.toml")
    assert ended == [code]
    assert capsys.readouterr().err.splitlines() == (["error: no way"] if error else [])


def test_paths_of_the_node_count_from_the_sites_file(tmp_path):
    (tmp_path / "SITE.toml").write_text('name = "a"\nmodel = "m"\ndata = "d"\n[node]\nsuperlink = "h:1"\n')
    node = load_site_config(tmp_path / "SITE.toml").node
    assert node is not None and node.key == str(tmp_path / "node.key") and node.state == str(tmp_path / "flwr")
    (tmp_path / "SITE.toml").write_text('name = "a"\nmodel = "m"\ndata = "d"\n[node]\nsuperlink = "http://h"\n')
    with pytest.raises(ConfigError, match="expected host:port"):
        load_site_config(tmp_path / "SITE.toml")


def test_the_node_loads_neither_torch_nor_transformers():
    import subprocess
    import sys

    program = "import sys, fedloom.cli.main, fedloom.cli.node, fedloom.flower.node.service\n"
    code = program + "print({'torch', 'transformers', 'peft', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
