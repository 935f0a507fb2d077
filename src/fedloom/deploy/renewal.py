"""New certificates for a federation that runs: the server's own, or the CA's, with a time in which both are trusted.

A new CA comes in three steps, and no site is locked out on the way:

1. `renew --ca`: ca.pem holds the new CA and the old one, the server's certificate stays. Carry ca.pem to the server
   and, one after the other, to the sites.
2. `renew`: the server's certificate is signed by the new CA.
3. `renew --drop-old-ca`: ca.pem holds the new CA alone. Carry it out again.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from fedloom.deploy.certificates import (
    certificate_pem,
    is_signed_by,
    key_pem,
    new_ca,
    new_key,
    new_server,
    read_certificate,
    read_certificates,
    read_key,
)
from fedloom.deploy.federation import parse_endpoint, read_plan, server_hosts, write_new
from fedloom.errors import ConfigError


def renew_server(folder: Path, days: int) -> Path:
    """A new key and certificate for the server, for the same names; the old ones are kept as *.old."""
    federation, server = read_plan(folder), folder / "server"
    ca, ca_key = read_certificate(folder / "ca" / "ca.pem"), read_key(folder / "ca" / "ca.key")
    key = new_key()
    certificate = new_server(key, server_hosts(federation), ca, ca_key, days)
    for name in ("server.pem", "server.key"):
        os.replace(server / name, server / f"{name}.old")
    write_new(server / "server.pem", certificate_pem(certificate))
    write_new(server / "server.key", key_pem(key), 0o600)
    return server / "server.pem"


def renew_ca(folder: Path) -> list[Path]:
    """A new CA beside the old one: every ca.pem of the federation holds both. Returns the files to carry out.

    Raises ConfigError where such a change is under way already.
    """
    host, _ = parse_endpoint(read_plan(folder).address, "address")
    path = folder / "ca" / "ca.pem"
    held = read_certificates(path)
    if len(held) > 1:
        raise ConfigError(f"{path} holds two CAs: end that change first (renew, then renew --drop-old-ca)")
    key = new_key()
    # Another name than the CA before it: a program that chooses an issuer by its name must not meet two of one name.
    new = new_ca(key, f"fedloom CA of {datetime.now(UTC):%Y-%m-%d %H:%M:%S} for {host}")
    os.replace(folder / "ca" / "ca.key", folder / "ca" / "ca.key.old")
    write_new(folder / "ca" / "ca.key", key_pem(key), 0o600)
    return _hand_out(folder, certificate_pem(new) + certificate_pem(held[0]))


def drop_old_ca(folder: Path) -> list[Path]:
    """Trust the new CA alone from now on. Returns the files to carry out.

    Raises ConfigError where no change is under way, or the server's certificate is still signed by the old CA.
    """
    path = folder / "ca" / "ca.pem"
    held = read_certificates(path)
    if len(held) < 2:
        raise ConfigError(f"{path} holds one CA: there is no older one to drop")
    if not is_signed_by(read_certificate(folder / "server" / "server.pem"), held[0]):
        raise ConfigError(
            f"the server's certificate is signed by the old CA: `fedloom federation renew {folder}` first"
        )
    return _hand_out(folder, certificate_pem(held[0]))


def _hand_out(folder: Path, content: bytes) -> list[Path]:
    """Put this into every ca.pem; the one before is kept as ca.pem.old."""
    files = [folder / "ca" / "ca.pem", folder / "server" / "ca.pem", *sorted(folder.glob("sites/*/ca.pem"))]
    for path in files:
        partial = path.with_name("ca.pem.new")
        partial.write_bytes(content)
        os.replace(path, path.with_name("ca.pem.old"))
        os.replace(partial, path)
    return files[1:]
