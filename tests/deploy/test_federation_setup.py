"""Keys, certificates and files of a federation: what `init` writes holds, and the doctor finds what does not."""

import http.server
import json
import os
import shutil
import subprocess
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)
from typer.testing import CliRunner

from fedloom.cli import main as cli
from fedloom.deploy import network
from fedloom.deploy.certificates import (
    certificate_pem,
    hosts_of,
    is_signed_by,
    new_ca,
    new_key,
    new_server,
    read_certificate,
    read_key,
)
from fedloom.deploy.doctor import examine
from fedloom.deploy.federation import (
    FederationPlan,
    add_site,
    parse_endpoint,
    read_plan,
    write_federation,
)
from fedloom.deploy.renewal import renew_server
from fedloom.errors import ConfigError
from fedloom.site.config import SiteConfig, load_site_config
from fedloom.site.privacy import Privacy
from fedloom.site.rules import ExamplePrivacy, Policy
from pretend_superlink import serving

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
ASKED = FederationPlan(
    address="fed.example.org:9443",
    listen="127.0.0.1:8443",
    model=str(TESTBED / "model"),
    data=str(TESTBED / "data" / "{site}" / "train.jsonl"),
)


@pytest.fixture
def made(tmp_path):
    write_federation(tmp_path / "fed", ASKED, ["bank", "lab"])
    return tmp_path / "fed"


def by_name(checks):
    return {check.what: check for check in checks}


def test_every_private_key_is_for_its_owner_alone(made):
    keys = [path for path in made.rglob("*") if b"PRIVATE KEY" in (path.read_bytes() if path.is_file() else b"")]
    assert sorted(path.name for path in keys) == ["ca.key", "node.key", "node.key", "server.key"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in keys)
    assert not list((made / "server").rglob("ca.key")) and not list((made / "sites").rglob("server.key"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_accepts_the_certificates_and_their_names(made):
    def verified(*options):
        command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", *options]
        command += ["-CAfile", str(made / "ca" / "ca.pem"), str(made / "server" / "server.pem")]
        return subprocess.run(command, capture_output=True, text=True).returncode == 0

    assert verified("-verify_hostname", "fed.example.org") and verified("-verify_ip", "127.0.0.1")
    assert not verified("-verify_hostname", "other.example.org")


def test_the_certificate_says_what_it_is_for(made):
    server, ca = read_certificate(made / "server" / "server.pem"), read_certificate(made / "ca" / "ca.pem")
    assert set(hosts_of(server)) == {"fed.example.org", "127.0.0.1", "localhost"}
    assert is_signed_by(server, ca) and is_signed_by(ca, ca) and not is_signed_by(ca, server)
    other = new_key()
    assert not is_signed_by(server, new_ca(other, "fedloom CA for fed.example.org"))
    assert timedelta(days=820) < server.not_valid_after_utc - datetime.now(UTC) < timedelta(days=830)


def test_node_keys_are_what_flower_reads_and_differ(made):
    keys = {}
    for site in ("bank", "lab"):
        private = load_ssh_private_key((made / "sites" / site / "node.key").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name == "secp384r1"
        registered = load_ssh_public_key((made / "server" / "nodes" / f"{site}.pub").read_bytes())
        assert registered == private.public_key()
        keys[site] = private.private_numbers().private_value
    assert keys["bank"] != keys["lab"]


def test_files_say_the_same_everywhere_and_leave_no_gap(made):
    for path in made.rglob("*"):
        if path.is_file() and path.suffix not in (".pem", ".key", ".pub"):
            assert "%{" not in path.read_text(), path
    for script in made.rglob("*.sh"):
        assert os.access(script, os.X_OK) and subprocess.run(["sh", "-n", script]).returncode == 0
    connection = tomllib.loads((made / "server" / "flwr" / "config.toml").read_text())["superlink"]["federation"]
    assert connection == {"address": "127.0.0.1:8443", "root-certificates": str(made / "server" / "ca.pem")}
    assert "--superlink fed.example.org:9443" in (made / "sites" / "lab" / "supernode.sh").read_text()
    run = tomllib.loads((made / "server" / "run.toml").read_text())
    assert run["federation"]["participants"] == ["bank", "lab"]


def test_telemetry_and_installs_are_off_and_nodes_must_show_their_keys(made):
    superlink, node = (made / "server" / "superlink.sh").read_text(), (made / "sites/lab/supernode.sh").read_text()
    for text in (superlink, node):
        assert "FLWR_TELEMETRY_ENABLED=0" in text and "FLWR_DISABLE_UPDATE_CHECK=1" in text
        assert "--insecure" not in text and "--allow-runtime" not in text
    assert "--disable-runtime-dependency-installation" in superlink and "--enable-supernode-auth" in superlink


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_the_proxy_passes_the_fleet_path_on_and_nothing_else(made, name):
    text = (made / "server" / name).read_text()
    assert "/v1/fleet/" in text and "403" in text
    assert not any(path in text for path in ("/v1/control", "/v1/runtime", "0.0.0.0"))


def test_site_toml_is_read_back_and_names_every_setting(made):
    path = made / "sites" / "lab" / "SITE.toml"
    config = load_site_config(path)
    assert (config.name, config.policy, config.state) == ("lab", Policy(), str(path.parent / "state"))
    everything = path.read_text().replace("# [policy.", "[policy.").replace("# [peers]", "[peers]")
    lines = [line.removeprefix("# ") if " = " in line else line for line in everything.splitlines()]
    tree = tomllib.loads("\n".join(lines))
    assert set(tree) == set(SiteConfig.model_fields) and tree["socket_group"] == "fedloom-node"
    assert set(tree["policy"]) == set(Policy.model_fields)
    assert set(tree["policy"]["privacy"]) == set(Privacy.model_fields)
    assert set(tree["policy"]["example_privacy"]) == set(ExamplePrivacy.model_fields)
    assert Policy.model_validate(tree["policy"]).privacy.max_epsilon == 8.0


def test_nothing_is_written_over(made):
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="written over"):
        write_federation(made, ASKED, ["bank", "lab"])
    with pytest.raises(ConfigError, match="written over"):
        add_site(made, "lab")
    assert before == {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}


def test_a_site_is_added_with_a_key_of_its_own_or_one_it_made_itself(made, tmp_path):
    add_site(made, "depot")
    assert "--port 9096" in (made / "sites" / "depot" / "supernode.sh").read_text()
    own = tmp_path / "own.pub"
    own.write_bytes((made / "sites" / "lab" / "node.pub").read_bytes())
    site = add_site(made, "clinic", own)
    assert not (site / "node.key").exists()
    assert (made / "server" / "nodes" / "clinic.pub").read_bytes() == own.read_bytes()
    own.write_text("ssh-rsa AAAA")
    with pytest.raises(ConfigError, match="ECDSA"):
        add_site(made, "other", own)
    assert not (made / "sites" / "other").exists()


def test_a_renewed_certificate_is_for_the_same_names_with_another_key(made):
    before = read_certificate(made / "server" / "server.pem")
    renew_server(made, 30)
    after = read_certificate(made / "server" / "server.pem")
    assert hosts_of(before) == hosts_of(after) and before.public_key() != after.public_key()
    assert (made / "server" / "server.key").stat().st_mode & 0o777 == 0o600
    assert by_name(examine(made / "server", online=False))["chain"].outcome == "ok"


WRONG_ADDRESSES = ["fed.example.org", ":8443", "a b:1", "host:0", "host:70000", "http://host:1", ""]
WRONG_ADDRESSES += [
    "host:\u0668\u0664\u0664\u0663",
    "a..b:1",
    "a-.b:1",
    "1.2.3:1",
    "300.1.1.1:1",
    "[::1::]:1",
    "[1.2]:1",
]
WRONG_ADDRESSES += ["host:1\n", f"{'a' * 64}:1", f"{'a.' * 127}a:1", "host;:1"]


@pytest.mark.parametrize("address", WRONG_ADDRESSES)
def test_a_wrong_address_is_refused_before_anything_is_written(tmp_path, address):
    with pytest.raises(ConfigError, match="host:port"):
        write_federation(tmp_path / "fed", ASKED.model_copy(update={"address": address}), ["bank"])
    assert not (tmp_path / "fed").exists()


def test_a_wrong_address_of_the_superlink_is_refused_too(tmp_path):
    with pytest.raises(ConfigError, match="--listen"):
        write_federation(tmp_path / "fed", ASKED.model_copy(update={"listen": "a..b:1"}), ["bank"])
    assert not (tmp_path / "fed").exists()


@pytest.mark.parametrize("address", ["fed.example.org:9443", "10.0.0.1:1", "[2001:db8::1]:65535", "a-b.c:80"])
def test_a_right_address_is_taken(address):
    assert parse_endpoint(address, "--address")[1] > 0


QUOTED = [
    'x"\nstate = "/elsewhere',
    "C:\\new\\table",
    "a'b",
    '"""',
    "tab\t and \x7f",
    "Größe %{name} $HOME",
    "\U0001f600",
]


@pytest.mark.parametrize("value", QUOTED)
def test_a_value_stands_in_toml_as_it_was_given(tmp_path, value):
    write_federation(tmp_path / "fed", ASKED.model_copy(update={"model": value, "data": f"{value}/{{site}}"}), ["lab"])
    tree = tomllib.loads((tmp_path / "fed" / "sites" / "lab" / "SITE.toml").read_text())
    assert (tree["name"], tree["model"], tree["data"]) == ("lab", value, f"{value}/lab")
    assert (tree["state"], tree["policy"]) == ("./state", {"order": "site", "scrub_errors": True})
    run = tomllib.loads((tmp_path / "fed" / "server" / "run.toml").read_text())
    assert run["model"] == {"path": value} and set(run) == {"model", "federation", "training", "method", "flower"}


HARMFUL = [
    "/etc/x\nExecStartPre=/bin/sh",
    "/etc/a b",
    '/etc/"x"',
    "/etc/a;b",
    "/etc/100%",
    "/etc/$x",
    "/etc/{x}",
    "/e\\n",
]


@pytest.mark.parametrize("kept", [*HARMFUL, "etc/fedloom", "~/fed", "./fed", "C:\\fed"])
def test_a_folder_that_a_unit_could_misread_is_refused_before_anything_is_written(tmp_path, made, kept):
    with pytest.raises(ConfigError, match="--site-folder"):
        write_federation(tmp_path / "other", ASKED.model_copy(update={"site_folder": kept}), ["lab"])
    assert not (tmp_path / "other").exists()
    (made / "federation.toml").write_text(tomli_w.dumps({**read_plan(made).model_dump(), "site_folder": kept}))
    with pytest.raises(ConfigError, match="--site-folder"):
        add_site(made, "depot")
    assert not (made / "sites" / "depot").exists() and not (made / "server" / "nodes" / "depot.pub").exists()


@pytest.mark.parametrize("name", ["my fed", 'a"b', "a;b", "100%", "x\nUser=root"])
def test_a_folder_to_make_that_a_proxy_rule_could_misread_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="DIR"):
        write_federation(tmp_path / name, ASKED, ["lab"])
    assert not (tmp_path / name).exists()


def test_a_site_folder_goes_into_the_units_as_it_is(tmp_path):
    write_federation(tmp_path / "fed", ASKED.model_copy(update={"site_folder": "/srv/fed@{site}/é-1"}), ["lab"])
    unit = (tmp_path / "fed" / "sites" / "lab" / "fedloom-worker.service").read_text()
    assert "/fedloom worker /srv/fed@lab/é-1/SITE.toml\n" in unit


def test_text_that_no_file_can_hold_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--model"):
        write_federation(tmp_path / "fed", ASKED.model_copy(update={"model": "/\udcff"}), ["lab"])
    assert not (tmp_path / "fed").exists()


def test_what_the_scripts_start_writes_for_its_owner_alone(made, tmp_path):
    """The SuperLink's database holds every update; what an earlier version left readable is closed as well."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("flower-superlink", "flower-supernode"):
        (programs / name).write_text("#!/bin/sh\n: > $WRITES\n")
        (programs / name).chmod(0o755)
    state, node = made / "server" / "state", made / "sites" / "lab" / "flwr"
    state.mkdir()
    (state / "superlink.db").write_bytes(b"FLOM")
    (state / "superlink.db").chmod(0o644)
    for script, writes in (
        (made / "server" / "superlink.sh", state / "new"),
        (node.parent / "supernode.sh", node / "new"),
    ):
        environment = {"PATH": f"{programs}:/usr/bin:/bin", "WRITES": str(writes)}
        subprocess.run([script], env=environment, umask=0o022)
        assert writes.exists()
    for path in (state, state / "superlink.db", state / "new", node, node / "new"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert by_name(examine(made / "server", online=False))["state"].outcome == "ok"
    for unit in made.rglob("*.service"):
        assert "\nUMask=0077\n" in unit.read_text()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_no_key_is_committed_by_accident(made):
    for folder in (made.parent, made / "server", made / "sites" / "lab"):
        subprocess.run(["git", "init", "--quiet", folder], check=True)
        command = ["git", "-C", folder, "status", "--porcelain", "--untracked-files=all", "--", "."]
        assert subprocess.run(command, check=True, capture_output=True).stdout == b""
        shutil.rmtree(folder / ".git")


@pytest.mark.parametrize("sites", [[], ["bank", "bank"], ["../bank"], ['a"b'], [""]])
def test_wrong_names_of_sites_are_refused(tmp_path, sites):
    with pytest.raises(ConfigError, match="site"):
        write_federation(tmp_path / "fed", ASKED, sites)
    assert not (tmp_path / "fed").exists()


def test_the_doctor_has_nothing_to_say_about_fresh_files(made):
    for path in (made / "server", made / "sites" / "lab" / "SITE.toml", made / "sites" / "bank"):
        checks = examine(path, online=False)
        wrong = [check for check in checks if check.outcome == "fail"]
        assert not wrong and len(checks) > 8


def test_the_digest_of_the_base_model_is_compared(tmp_path):
    write_federation(tmp_path / "fed", ASKED.model_copy(update={"model_digest": "0" * 32}), ["lab"])
    for path in ("server", "sites/lab"):
        check = by_name(examine(tmp_path / "fed" / path, online=False))["model"]
        assert check.outcome == "fail" and "0" * 32 in check.found
    digest = check.found.partition("digest ")[2].partition(";")[0]
    write_federation(tmp_path / "right", ASKED.model_copy(update={"model_digest": digest}), ["lab"])
    assert by_name(examine(tmp_path / "right" / "sites" / "lab", online=False))["model"].outcome == "ok"


def readable_key(folder):
    (folder / "sites" / "lab" / "node.key").chmod(0o644)


def rsa_key(folder):
    key = rsa.generate_private_key(65537, 2048)
    path = folder / "sites" / "lab" / "node.key"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def no_data(folder):
    path = folder / "sites" / "lab" / "SITE.toml"
    path.write_text(path.read_text().replace("data/lab", "data/nowhere"))


def too_few(folder):
    path = folder / "sites" / "lab" / "SITE.toml"
    path.write_text(path.read_text().replace("# min_examples = 100 ", "min_examples = 1000000 "))


def another_ca(folder):
    (folder / "sites" / "lab" / "ca.pem").write_bytes((folder / "server" / "server.pem").read_bytes())


def garbled_ca(folder):
    (folder / "sites" / "lab" / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\nnothing\n")


def touched_audit(folder):
    audit = folder / "sites" / "lab" / "state" / "audit"
    audit.mkdir(parents=True)
    (audit / "audit.jsonl").write_text("{}\n")


def misspelt(folder):
    path = folder / "sites" / "lab" / "SITE.toml"
    path.write_text(path.read_text().replace("scrub_errors", "scrub_error"))


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (readable_key, "node.key"),
        (rsa_key, "node.key"),
        (no_data, "data"),
        (too_few, "data"),
        (another_ca, "ca.pem"),
        (garbled_ca, "ca.pem"),
        (touched_audit, "audit"),
        (misspelt, "SITE.toml"),
    ],
)
def test_the_doctor_finds_what_is_wrong_at_a_site(made, harm, what):
    harm(made)
    wrong = [check for check in examine(made / "sites" / "lab", online=False) if check.outcome == "fail"]
    assert [check.what for check in wrong] == [what] and wrong[0].advice


def expired(folder):
    ca, ca_key = read_certificate(folder / "ca" / "ca.pem"), read_key(folder / "ca" / "ca.key")
    key = read_key(folder / "server" / "server.key")
    made = new_server(key, ["fed.example.org", "127.0.0.1"], ca, ca_key, days=0)
    (folder / "server" / "server.pem").write_bytes(certificate_pem(made))


def for_another_host(folder):
    path = folder / "server" / "federation.toml"
    path.write_text(path.read_text().replace("fed.example.org", "new.example.org"))


def with_another_key(folder):
    os.replace(folder / "ca" / "ca.key", folder / "server" / "server.key")


def from_another_ca(folder):
    (folder / "server" / "ca.pem").write_bytes(certificate_pem(new_ca(new_key(), "another")))


def without_a_connection(folder):
    (folder / "server" / "flwr" / "config.toml").write_text("[superlink]\n")


def moved(folder):
    path = folder / "server" / "flwr" / "config.toml"
    path.write_text(path.read_text().replace(str(folder), "/elsewhere"))


def readable_updates(folder):
    (folder / "server" / "state").mkdir()
    (folder / "server" / "state").chmod(0o755)


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (readable_updates, "state"),
        (expired, "server.pem"),
        (for_another_host, "SANs"),
        (with_another_key, "server.key"),
        (from_another_ca, "chain"),
        (moved, "connection"),
        (without_a_connection, "connection"),
    ],
)
def test_the_doctor_finds_what_is_wrong_at_the_server(made, harm, what):
    harm(made)
    wrong = [check for check in examine(made / "server", online=False) if check.outcome == "fail"]
    assert [check.what for check in wrong] == [what] and wrong[0].advice


class Pretender(http.server.BaseHTTPRequestHandler):
    """Answers 200 to all, as a SuperLink without a proxy does to /health; its clock may be wrong."""

    statuses: ClassVar[dict[str, int]] = {}
    minutes = 0.0

    def do_GET(self):
        self.send_response_only(self.statuses.get(self.path, 200))
        at = datetime.now(UTC) - timedelta(minutes=self.minutes)
        self.send_header("Date", at.strftime("%a, %d %b %Y %H:%M:%S GMT"))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def pretender(made):
    """A TLS server with the federation's certificate; yields (its class, its port)."""
    kind = type("Pretending", (Pretender,), {})
    with serving(kind, made / "server") as port:
        yield kind, port


def test_the_way_to_the_superlink_is_tried(made, pretender):
    kind, port = pretender
    found = by_name(network.check_superlink("localhost", port, made / "ca" / "ca.pem"))
    assert {check.outcome for check in found.values()} == {"ok"} and "this machine alone" in found["exposure"].found
    kind.statuses = {"/health": 403}
    found = by_name(network.check_superlink("localhost", port, made / "ca" / "ca.pem"))
    assert found["exposure"].found == "only the fleet path is open from here"
    for status in (403, 502):
        kind.statuses = {"/health": 403, "/v1/fleet/": status}
        found = by_name(network.check_superlink("localhost", port, made / "ca" / "ca.pem"))
        assert found["fleet path"].outcome == "fail" and str(status) in found["fleet path"].found


@pytest.mark.parametrize(("minutes", "outcome"), [(0.0, "ok"), (-4.0, "ok"), (-6.0, "fail"), (0.2, "fail")])
def test_clocks_are_compared_as_flower_will(made, pretender, minutes, outcome):
    """Our clock ahead of the server's by so many minutes; Flower lets a site be 5 s ahead and 305 s behind."""
    kind, port = pretender
    kind.minutes = minutes
    check = by_name(network.check_superlink("localhost", port, made / "ca" / "ca.pem"))["clock"]
    assert check.outcome == outcome or (minutes == -4.0 and check.outcome == "warn")


def test_another_ca_or_name_and_a_dead_port_are_told_apart(made, pretender, tmp_path):
    _, port = pretender
    other = tmp_path / "other.pem"
    other.write_bytes(certificate_pem(new_ca(new_key(), "another")))
    assert "certificate" in network.check_superlink("localhost", port, other)[0].found
    renamed = network.check_superlink("127.0.0.2", port, made / "ca" / "ca.pem")[0]
    assert renamed.outcome == "fail" and renamed.advice
    assert "nobody listens" in network.check_superlink("localhost", 1, made / "ca" / "ca.pem")[0].found
    assert "resolved" in network.check_superlink("no-such-host.invalid", 1, made / "ca" / "ca.pem")[0].found


def test_the_commands_say_what_they_made_and_fail_with_an_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    made = run.invoke(cli.app, ["federation", "init", "fed", "--address", "localhost:8443", "--site", "lab"])
    assert made.exit_code == 0 and "sites/lab" in made.stdout
    again = run.invoke(cli.app, ["federation", "init", "fed", "--address", "localhost:8443", "--site", "lab"])
    assert again.exit_code == 2 and "written over" in again.stderr
    told = run.invoke(cli.app, ["federation", "doctor", "fed/sites/lab/SITE.toml", "--offline", "--json"])
    checks = {check["what"]: check for check in json.loads(told.stdout)}
    assert told.exit_code == 1 and checks["model"]["outcome"] == checks["data"]["outcome"] == "fail"
    assert run.invoke(cli.app, ["federation", "doctor", "."]).exit_code == 2
    assert read_plan(tmp_path / "fed").address == "localhost:8443"
