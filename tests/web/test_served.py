"""What the server answers, over a real socket: whom, to which requests, with which headers; runs that come and go."""

import gzip
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fedloom.errors import ConfigError
from fedloom.report.page import RunSet
from fedloom.web import serving
from fedloom.web.guard import allowed_hosts, host_name
from fedloom.web.runs import Runs
from fedloom.web.serving import Service
from served_runs import WrittenRun, served

REPO = Path(__file__).parents[2]


def ask(url, path="/", method="GET", **headers):
    """(status, headers, body) of one request, with the path as it is."""
    place = urlsplit(url)
    line = http.client.HTTPConnection(place.hostname, place.port, timeout=20)
    try:
        line.putrequest(method, path, skip_host="host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            line.putheader(name.replace("_", "-"), value)
        line.endheaders()
        answer = line.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        line.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run that is over, and its address."""
    run = WrittenRun(tmp_path_factory.mktemp("one") / "demo").begin().play(2).end()
    with served(run.folder) as service:
        yield service.url


def test_the_page_is_html_that_may_run_its_own_scripts_alone(one):
    status, headers, body = ask(one)
    assert status == 200 and headers["content-type"].startswith("text/html") and b"<html" in body
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in policy["script-src"] and "*" not in headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/", "/data.json", "/nothing", "/run/none/"])
def test_every_answer_says_what_a_browser_may_do_with_it(one, path):
    _, headers, _ = ask(one, path)
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers and "server" not in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8321", "localhost.evil.example", "8.8.8.8", ""]
)
def test_another_name_for_this_machine_is_refused(one, host):
    status, _, body = ask(one, "/data.json", host=host)
    assert status == 421 and b"under no other name" in body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:8321", "[::1]:80"])
def test_the_names_of_this_machine_are_allowed(one, host):
    assert ask(one, "/data.json", host=host)[0] == 200


def test_where_others_may_ask_any_address_will_do_but_no_other_name():
    assert set(allowed_hosts("127.0.0.1")) == {"localhost", "127.0.0.1", "::1"}
    assert "*" in allowed_hosts("0.0.0.0") and "lab.example" in allowed_hosts("lab.example")
    assert [host_name(host) for host in ("[fe80::1]:80", "A.b:1", "[", ":")] == ["fe80::1", "a.b", "", ""]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/", "/nothing"])
def test_nothing_can_be_changed(one, method, path):
    status, headers, _ = ask(one, path, method)
    assert status == 405 and headers["allow"] == "GET, HEAD"


def test_head_has_the_headers_alone(one):
    status, headers, body = ask(one, "/data.json", "HEAD")
    assert status == 200 and body == b"" and int(headers["content-length"]) > 10 and headers["etag"]


@pytest.mark.parametrize(
    "path",
    [
        "/../config.toml",
        "/config.toml",
        "/ledger.jsonl",
        "/run/../config.toml",
        "/run/%2e%2e/%2e%2e/etc/passwd",
        "/run/..%2f..%2fetc/",
        "/run//etc/",
        "/figures/../ledger.jsonl",
        "/figures/..%2fledger.jsonl",
        "/figures/%2fetc%2fpasswd.csv",
        "/figures/none.png",
        "/run/demo/figures/none.exe",
        "//etc/passwd",
        "/%00",
    ],
)
def test_no_address_leads_to_a_file(one, path):
    status, _, body = ask(one, path)
    assert status == 404 and len(body) < 200 and b"run" not in body[:5]


def test_a_packed_answer_is_the_same(one):
    plain, packed = ask(one, "/"), ask(one, "/", accept_encoding="gzip")
    assert packed[1].get("content-encoding") == "gzip" and gzip.decompress(packed[2]) == plain[2]


def test_figures_are_files_of_three_kinds(one):
    status, headers, listed = ask(one, "/figures/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    names = re.findall(r'href="([\w-]+)\.png"', listed.decode())
    assert len(names) >= 6 and f'href="{names[0]}.csv"' in listed.decode()
    told = re.search(r"8321/figures/([\w-]+)\.csv", (REPO / "docs" / "page.md").read_text(encoding="utf-8"))
    assert told[1] in names, "the figure that docs/page.md names"
    status, headers, picture = ask(one, f"/figures/{names[0]}.png")
    assert (status, headers["content-type"], picture[:4]) == (200, "image/png", b"\x89PNG")
    status, headers, drawing = ask(one, f"/figures/{names[0]}.svg")
    assert headers["content-type"] == "image/svg+xml" and b"<svg" in drawing[:600]
    assert "script-src" not in headers["content-security-policy"]  # nor anything else that it may load
    for name in names:
        status, headers, numbers = ask(one, f"/run/demo/figures/{name}.csv")
        assert status == 200 and headers["content-type"].startswith("text/csv") and numbers.count(b"\n") >= 2
        assert ask(one, f"/figures/{name}.csv", if_none_match=headers["etag"])[0] == 304


def test_data_is_sent_once_and_again_where_a_round_was_played(tmp_path, monkeypatch):
    run = WrittenRun(tmp_path / "my").begin().play()
    reads = []
    read = RunSet.read
    monkeypatch.setattr(RunSet, "read", lambda held: reads.append(held) or read(held))
    with served(run.folder) as service:
        status, headers, body = ask(service.url, "/data.json")
        assert status == 200 and json.loads(body)["version"]
        known = headers["etag"]
        for _ in range(3):
            status, headers, body = ask(service.url, "/data.json", if_none_match=f'"x", {known}')
            assert (status, body, headers["etag"]) == (304, b"", known)
        assert len(reads) == 1  # nothing was written, so nothing was read
        run.play()
        status, headers, again = ask(service.url, "/data.json", if_none_match=known)
        assert status == 200 and headers["etag"] != known
        assert len(reads) == 2 and reads[0] is reads[1]  # the same reader goes on where it was
        run.end()
        status, headers, over = ask(service.url, "/data.json", if_none_match=headers["etag"])
        assert status == 200 and again != over


def test_a_run_whose_process_is_gone_is_not_shown_as_running(tmp_path):
    run = WrittenRun(tmp_path / "my").begin().play()
    with served(run.folder) as service:
        first = json.loads(ask(service.url, "/data.json")[2])
        run.close()  # as kill -9 does: not a row more, and the lock is free
        status, _, body = ask(service.url, "/data.json", if_none_match=f'W/"{first["version"]}"')
        told = json.loads(body)
    assert status == 200 and (first["state"], told["state"]) == ("running", "over")
    assert "running" in first["main"] and "ended without a word" in told["main"]


def test_runs_of_a_folder_appear_and_go(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    with served(runs) as service:
        status, headers, body = ask(service.url)
        assert status == 200 and b"no run here yet" in body and b'http-equiv="refresh"' in body
        assert ask(service.url, "/data.json")[0] == 404
        first = WrittenRun(runs / "demo")
        assert b"being set up" in ask(service.url)[2]
        first.begin().play().end()
        assert b"being set up" not in ask(service.url)[2]
        WrittenRun(runs / "study" / "fedit" / "seed-0", method="fedit").begin().play(2).end()
        page = ask(service.url)[2].decode()
        assert 'href="/run/demo/"' in page and 'href="/run/seed-0/"' in page
        assert ask(service.url, "/run/seed-0/data.json")[0] == 200
        shutil.rmtree(runs / "study")
        status, _, body = ask(service.url, "/run/seed-0/")
        assert status == 404 and b"no such run" in body
        assert ask(service.url)[0] == 200


def test_a_run_that_cannot_be_read_says_why_and_hides_no_other(tmp_path):
    good = WrittenRun(tmp_path / "good").begin().play().end()
    bad = WrittenRun(tmp_path / "bad").begin().play().end()
    sound = (bad.folder / "ledger.jsonl").read_bytes()
    (bad.folder / "ledger.jsonl").write_bytes(b'{"row": "nonsense"}\n' + sound)
    with served(good.folder, bad.folder) as service:
        for _ in range(2):  # a second look finds the same
            assert b"has a line that is no row of a ledger" in ask(service.url, "/run/bad/")[2]
        assert ask(service.url, "/data.json")[0] == ask(service.url, "/run/good/data.json")[0] == 200
        (bad.folder / "ledger.jsonl").write_bytes(sound)
        assert ask(service.url, "/run/bad/data.json")[0] == 200


def test_names_are_as_short_as_they_can_be(tmp_path):
    for name in ("a/fedit/seed-0", "a/loom/seed-0", "b/loom/seed-0", "demo"):
        WrittenRun(tmp_path / name).begin().end()
    assert list(Runs([tmp_path]).find()) == ["fedit/seed-0", "a/loom/seed-0", "b/loom/seed-0", "demo"]
    assert list(Runs([tmp_path / "demo", tmp_path / "a" / "fedit"]).find()) == ["demo", "seed-0"]


def test_nothing_is_looked_for_within_a_run_behind_a_link_or_far_below(tmp_path):
    WrittenRun(tmp_path / "runs" / "demo").begin().end()
    WrittenRun(tmp_path / "runs" / "demo" / "old").begin().end()
    WrittenRun(tmp_path / "away").begin().end()
    WrittenRun(tmp_path / "runs" / "1" / "2" / "3" / "4").begin().end()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "away")
    (tmp_path / "runs" / "circle").symlink_to(tmp_path / "runs")
    assert list(Runs([tmp_path / "runs"]).find()) == ["demo"]


@pytest.mark.parametrize(
    ("made", "said"),
    [("", "no such folder"), ("file", "is a file"), ("adapter/", "holds no run: no ledger.jsonl there")],
)
def test_what_is_no_run_is_refused(tmp_path, made, said):
    path = tmp_path / "it"
    if made == "file":
        path.touch()
    elif made:
        path.mkdir()
        (path / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match=f"{path}.*{said}"):
        Service([path])


def test_a_port_that_is_taken_is_said_and_the_usual_one_gives_way(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {taken} cannot be had on 127.0.0.1.*--port 0"):
            Service([tmp_path], port=taken)
        monkeypatch.setattr(serving, "PORT", taken)
        service = Service([tmp_path])
    assert str(taken) not in service.url
    service.close()


def test_others_may_read_only_where_the_user_says_so(tmp_path):
    with pytest.raises(ConfigError, match="--host 0.0.0.0: everybody who reaches this machine.*--anyone"):
        Service([tmp_path], host="0.0.0.0")
    with pytest.raises(ConfigError, match="expected an address of this machine"):
        Service([tmp_path], host="192.0.2.1", anyone=True)
    with served(tmp_path, host="0.0.0.0", anyone=True) as service:
        assert service.url.startswith("http://127.0.0.1:")
        assert ask(service.url, host="192.168.0.7:80")[0] == 200 and ask(service.url, host="evil.example")[0] == 421


def test_the_command_says_its_address_once_it_is_bound_and_ends_in_one_line(tmp_path):
    run = WrittenRun(tmp_path / "my").begin().play().end()
    command = [sys.executable, "-m", "fedloom", "serve", str(run.folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = process.stdout.readline()
        assert said.startswith("1 run at http://127.0.0.1:") and said.endswith("(Ctrl-C ends it)\n")
        with urllib.request.urlopen(said.split()[3], timeout=20) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, rest) == (0, "no longer served\n")
