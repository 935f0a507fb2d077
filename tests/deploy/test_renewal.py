"""A new CA takes the old one's place without locking a site out: what each side holds is tried with real TLS."""

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from typer.testing import CliRunner

from fedloom.cli import main as cli
from fedloom.deploy import machine
from fedloom.deploy.certificates import read_certificates
from fedloom.deploy.doctor import examine
from fedloom.deploy.federation import FederationPlan, add_site, write_federation
from fedloom.deploy.renewal import drop_old_ca, renew_ca, renew_server
from fedloom.errors import ConfigError


@pytest.fixture
def made(tmp_path):
    asked = FederationPlan(address="localhost:8443", listen="127.0.0.1:8443")
    write_federation(tmp_path / "fed", asked, ["bank", "lab"])
    return tmp_path / "fed"


def connects(server, ca):
    """Whether a client that trusts this CA file takes the certificate in this server's folder."""
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(server / "server.pem", server / "server.key")
    here, there = socket.socketpair()

    def serve():
        try:
            accepting.wrap_socket(there, server_side=True).close()
        except OSError:
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        context = ssl.create_default_context(cafile=str(ca))
        context.wrap_socket(here, server_hostname="localhost").close()
    except ssl.SSLCertVerificationError:
        return False
    finally:
        here.close()
        thread.join()
    return True


def test_sites_with_the_old_and_the_new_file_connect_at_every_step(made):
    server, old = made / "server", made.parent / "old.pem"
    old.write_bytes((made / "sites" / "lab" / "ca.pem").read_bytes())
    both = made / "sites" / "bank" / "ca.pem"
    carried = renew_ca(made)
    assert carried == [server / "ca.pem", both, made / "sites" / "lab" / "ca.pem"]
    assert len(read_certificates(both)) == 2
    assert connects(server, old) and connects(server, both)  # lab has not changed its file yet
    renew_server(made, 30)
    assert connects(server, both) and not connects(server, old)
    drop_old_ca(made)
    assert len(read_certificates(both)) == 1 and connects(server, both)
    assert (made / "ca" / "ca.key").stat().st_mode & 0o777 == 0o600
    wrong = [check.what for check in examine(server, online=False) if check.outcome == "fail"]
    assert wrong == ["model"]  # there is none here


def test_the_steps_are_taken_in_order(made):
    with pytest.raises(ConfigError, match="no older one"):
        drop_old_ca(made)
    renew_ca(made)
    with pytest.raises(ConfigError, match="end that change first"):
        renew_ca(made)
    with pytest.raises(ConfigError, match="signed by the old CA"):
        drop_old_ca(made)


def test_a_site_that_is_added_meanwhile_trusts_both(made):
    renew_ca(made)
    assert len(read_certificates(add_site(made, "depot") / "ca.pem")) == 2
    shown = {check.what: check for check in examine(made / "server", online=False)}
    assert shown["ca.pem"].outcome == shown["chain"].outcome == "ok" and "CA before" in shown["ca.pem"].found


def test_the_commands_say_what_to_carry_where(made):
    run = CliRunner()
    begun = run.invoke(cli.app, ["federation", "renew", str(made), "--ca"])
    assert begun.exit_code == 0 and begun.stdout.count("ca.pem") == 3 and f"federation renew {made}" in begun.stdout
    assert run.invoke(cli.app, ["federation", "renew", str(made)]).exit_code == 0
    assert run.invoke(cli.app, ["federation", "renew", str(made), "--ca", "--drop-old-ca"]).exit_code == 2
    assert run.invoke(cli.app, ["federation", "renew", str(made), "--drop-old-ca"]).exit_code == 0


@pytest.mark.parametrize(("days", "outcome"), [(31, "ok"), (29, "warn"), (6, "warn"), (0, "fail")])
def test_an_end_is_told_a_month_before(made, days, outcome):
    """Flower itself says nothing until a certificate is over, and then nothing connects."""
    ends = datetime.now(UTC) + timedelta(days=days, hours=12 if days else -1)
    check = machine.check_end("server.pem", "valid", ends, "renew it")
    assert check.outcome == outcome and ("nothing will connect" in check.found) == (days == 6)
    assert check.advice.startswith("now: ") == (days == 6)


def test_the_doctor_counts_the_days_of_the_servers_certificate_and_of_a_sites_key(made):
    renew_server(made, 20)
    key = made / "sites" / "lab" / "node.pub"
    soon = f"fedloom:until={datetime.now(UTC).date() + timedelta(days=10)}".encode()
    for path in (key, made / "server" / "nodes" / "lab.pub"):
        path.write_bytes(b" ".join([*path.read_bytes().split()[:2], soon]) + b"\n")
    server = {check.what: check for check in examine(made / "server", online=False)}
    assert server["server.pem"].outcome == server["sites"].outcome == "warn" and "lab" in server["sites"].found
    site = machine.check_node_key(key.with_name("node.key"))
    assert site.outcome == "warn" and "rotate" in site.advice
    key.write_bytes((made / "sites" / "bank" / "node.pub").read_bytes())
    assert machine.check_node_key(key.with_name("node.key")).outcome == "fail"


def test_both_cas_have_names_of_their_own(made):
    renew_ca(made)
    names = {certificate.subject for certificate in read_certificates(made / "ca" / "ca.pem")}
    assert len(names) == 2 and all(isinstance(name, x509.Name) for name in names)
