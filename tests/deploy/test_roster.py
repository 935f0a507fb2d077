"""Sites by name: who is let in, who is taken out, and what a new key takes; against Flower's own SuperLink."""

import json
import os
import shutil
import subprocess
from datetime import date, timedelta

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="the extra `flwr` is not installed")

from superlinks import connecting, control_client

from fedloom.cli import main as cli
from fedloom.deploy import roster
from fedloom.deploy.certificates import fingerprint, new_key, node_key_pair, public_line, use_until
from fedloom.deploy.federation import FederationPlan, write_federation
from fedloom.errors import ConfigError, RoundError
from fedloom.flower.nodes import list_nodes, register_node

ASKED = FederationPlan(address="localhost:8443", listen="127.0.0.1:8443")


@pytest.fixture
def made(tmp_path):
    write_federation(tmp_path / "fed", ASKED, ["bank", "lab"])
    return tmp_path / "fed"


@pytest.fixture
def client(monkeypatch):
    connected = control_client()
    monkeypatch.setattr(roster, "connect_control", connecting(connected))
    return connected


def fedloom(*arguments):
    return CliRunner().invoke(cli.app, ["federation", *map(str, arguments)])


def states(client):
    return [(node.name, node.status) for node in list_nodes(client)]


def test_a_site_is_registered_once_and_a_second_try_says_so(made, client):
    first, again = fedloom("register", made), fedloom("register", made / "server")
    assert first.exit_code == again.exit_code == 0, first.output + again.output
    assert first.stdout.count("registered as node") == 2 and again.stdout.count("registered already") == 2
    assert states(client) == [("bank", "registered"), ("lab", "registered")]


def test_a_site_is_taken_out_by_name_and_its_key_never_comes_back(made, client):
    fedloom("register", made)
    public = made / "server" / "nodes" / "lab.pub"
    line = public.read_bytes()
    gone = fedloom("revoke", made, "lab")
    assert gone.exit_code == 0 and "never comes back" in gone.stdout and f"rotate {made} lab" in gone.stdout
    assert states(client) == [("bank", "registered"), ("lab", "unregistered")] and not public.exists()
    assert roster.revoked_keys(made / "server") == [("lab", line)]
    public.write_bytes(line)  # somebody puts it back by hand
    again = fedloom("register", made)
    assert again.exit_code == 1 and "lab: its key was revoked, and a revoked key never comes back" in again.stdout


def test_a_new_key_lets_the_site_in_and_the_old_one_out(made, client):
    fedloom("register", made)
    own, before = made / "sites" / "lab", (made / "sites" / "lab" / "node.key").read_bytes()
    done = fedloom("rotate", made, "lab")
    assert done.exit_code == 0 and f"carry {own / 'node.key'}" in done.stdout.replace("\n", "")
    assert (own / "node.key.old").read_bytes() == before and (own / "node.key").stat().st_mode & 0o777 == 0o600
    assert (own / "node.key.old").stat().st_mode & 0o777 == 0o600
    public = load_ssh_private_key((own / "node.key").read_bytes(), None).public_key()
    assert load_ssh_public_key((made / "server" / "nodes" / "lab.pub").read_bytes()) == public
    found = {node.status: node.key for node in list_nodes(client) if node.name == "lab"}
    assert found["registered"] == public_line(public) and "unregistered" in found
    assert fedloom("register", made).exit_code == 0
    assert fedloom("rotate", made, "lab").exit_code == 0 and len(roster.revoked_keys(made / "server")) == 2


def test_a_site_that_was_taken_out_comes_back_with_a_key_that_it_made_itself(made, client, tmp_path):
    fedloom("register", made)
    fedloom("revoke", made, "lab")
    own = tmp_path / "own.pub"
    own.write_bytes(node_key_pair(new_key())[1])
    assert fedloom("rotate", made / "server", "lab", "--public-key", own).exit_code == 0
    assert states(client)[-1] == ("lab", "registered")
    used = fedloom("rotate", made, "bank", "--public-key", own)
    assert used.exit_code == 2 and "used before" in used.stderr


def test_no_private_key_is_made_on_the_server_and_no_site_is_made_up(made, client):
    assert "not made on the server" in fedloom("rotate", made / "server", "lab").stderr
    for command in ("revoke", "rotate"):
        told = fedloom(command, made, "labb")
        assert told.exit_code == 2 and "did you mean 'lab'?" in told.stderr
    assert sorted(roster.public_keys(made / "server")) == ["bank", "lab"]


def test_a_command_without_a_superlink_changes_files_and_register_ends_it_later(made, monkeypatch):
    def away(rules):
        raise RoundError("the SuperLink cannot be reached")

    monkeypatch.setattr(roster, "connect_control", away)
    told = fedloom("revoke", made, "lab")
    assert told.exit_code == 2 and "federation register" in told.stderr
    client = control_client()
    register_node(client, "lab", roster.revoked_keys(made / "server")[0][1])
    monkeypatch.setattr(roster, "connect_control", connecting(client))
    done = fedloom("register", made)
    assert done.exit_code == 0 and "revoked key is taken out" in done.stdout
    assert states(client) == [("lab", "unregistered"), ("bank", "registered")]


def test_nodes_that_no_file_names_and_names_that_differ_are_told(made, client):
    register_node(client, "stranger", node_key_pair(new_key())[1])
    register_node(client, "bonk", (made / "server" / "nodes" / "bank.pub").read_bytes())
    told = fedloom("register", made)
    assert told.exit_code == 1 and "another name, 'bonk'" in told.stdout and "stranger: node" in told.stdout
    assert [member.name for member in roster.list_members(made / "server", client)] == ["bank", "lab", "stranger"]


def test_the_list_names_sites_keys_and_ends(made, client):
    fedloom("register", made)
    fedloom("revoke", made, "bank")
    shown = json.loads(fedloom("list", made, "--json").stdout)
    by_name = {site["name"]: site for site in shown["sites"]}
    assert (by_name["lab"]["state"], by_name["bank"]["state"]) == ("registered", "revoked")
    assert by_name["lab"]["node"] == str(list_nodes(client)[1].node_id) and by_name["bank"]["seen"]
    line = (made / "server" / "nodes" / "lab.pub").read_bytes()
    assert by_name["lab"]["key"] == fingerprint(line) and by_name["lab"]["key_until"] == str(use_until(line))
    assert date.fromisoformat(shown["ends"]["ca"]) > date.fromisoformat(shown["ends"]["server_certificate"])
    assert "certificate until" in fedloom("list", made).stdout
    offline = json.loads(fedloom("list", made, "--offline", "--json").stdout)
    assert [(site["name"], site["state"]) for site in offline["sites"]] == [("lab", ""), ("bank", "revoked")]


def test_a_node_that_is_there_is_shown_as_online_with_its_last_sign_of_life(made, client):
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    fedloom("register", made)
    app = client._client._transport.app
    key = load_ssh_public_key((made / "server" / "nodes" / "lab.pub").read_bytes())
    state = app.state.linkstate_factory.state()
    state.acknowledge_node_heartbeat(state.get_node_id_by_public_key(public_key_to_bytes(key)), 30.0)
    member = next(member for member in roster.list_members(made / "server", client) if member.name == "lab")
    assert member.state == "online" and member.seen.startswith(str(date.today())[:3])


def test_a_folder_that_is_no_federation_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="federation init"):
        roster.server_folder(tmp_path)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_fingerprints_are_those_of_ssh_keygen(made):
    path = made / "server" / "nodes" / "lab.pub"
    told = subprocess.run(["ssh-keygen", "-l", "-f", path], check=True, capture_output=True, text=True).stdout
    assert fingerprint(path.read_bytes()) in told


def test_register_sh_calls_the_command(made, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "fedloom").write_text('#!/bin/sh\necho "$@" in "$PWD"\n')
    (programs / "fedloom").chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}"}
    said = subprocess.run(
        [made / "server" / "register.sh"], env=environment, check=True, capture_output=True, text=True
    )
    assert said.stdout == f"federation register . in {made / 'server'}\n"


def test_a_key_says_until_when_it_is_to_be_used():
    line = node_key_pair(new_key())[1]
    assert use_until(line) - date.today() in (timedelta(days=824), timedelta(days=825), timedelta(days=826))
    assert use_until(b"ecdsa-sha2-nistp384 AAAA fedloom:until=2026-99-99") is None
    assert use_until(b"ecdsa-sha2-nistp384 AAAA somebody@somewhere") is None
