"""`fedloom federation init`: everything that a federation on Flower needs in files, for the server and for each site.

DIR/
  federation.toml   what was asked for: read by `add` and `renew`, and with the others' copies by the doctor
  ca/               the federation's own CA; keep it away from the server, on a machine that is off the network
  server/           for the server: certificate, SuperLink, proxy rules, systemd unit, the sites' public keys, run.toml
  sites/NAME/       for one site: CA certificate, node key, SuperNode, worker, SITE.toml, systemd units
  .gitignore        so that no key is committed by accident; server/ and sites/NAME/ have one as well

Private keys have mode 0600. Nothing that exists is written over. What becomes of it later: `renewal` has new
certificates, `roster` new and revoked keys, `backup` copies.
Values are quoted where a file is TOML. Where it is not, in systemd units, scripts and proxy rules, only paths and
addresses that need no quotes are taken.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import TypeAlias

import tomli_w
from pydantic import ValidationError

from fedloom.deploy.certificates import (
    certificate_pem,
    key_pem,
    new_ca,
    new_key,
    new_server,
    node_key_pair,
    read_public_key,
)
from fedloom.deploy.versions import installed
from fedloom.errors import ConfigError
from fedloom.records.config import Section

FIRST_NODE_PORT = 9094
"""Each SuperNode listens on a local port of its own, counted from here, so that several can run on one machine."""
_SERVER_FILES = {
    "superlink.sh": 0o755,
    "register.sh": 0o755,
    "nginx.conf": 0o644,
    "Caddyfile": 0o644,
    "fedloom-superlink.service": 0o644,
    "fedloom.logrotate": 0o644,
    "run.toml": 0o644,
}
_SITE_FILES = {
    "SITE.toml": 0o644,
    "supernode.sh": 0o755,
    "fedloom-worker.service": 0o644,
    "fedloom-supernode.service": 0o644,
    "fedloom-node.service": 0o644,
    "fedloom.logrotate": 0o644,
}
RECORD = "federation.toml"
_PATH = r"/[\w./~+@-]*"
"""Absolute paths that mean the same in a systemd unit, in nginx.conf, in a Caddyfile and in a shell script: no spaces,
quotes, braces, semicolons, $, %, # or backslashes."""
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
"""One part of a host name (RFC 1123)."""
_ENDPOINT = rf"(?:\[([0-9A-Fa-f:.]+)\]|({_LABEL}(?:\.{_LABEL})*)):([0-9]{{1,5}})"
Value: TypeAlias = str | int | list[str]


class FederationPlan(Section):
    """What a federation is set up for.

    address: host:port that the sites connect to, the proxy's where there is one. listen: where the SuperLink itself
    listens. model, data: path of the base model and of a site's examples ({site} stands for its name). model_digest:
    `base_model.base_digest` of the server's model, "" where it is not known. site_folder: where a site will keep
    its files ({site} stands for its name); "" means where they are written. days: how long the server's certificate
    is valid. name: tells several federations on one machine apart, in units and users; "" for the only one. node_port:
    local port of the first site's SuperNode. flwr, fedloom: versions that it was set up with, "" where not known.
    """

    address: str
    listen: str
    model: str = "./model"
    data: str = "./data"
    model_digest: str = ""
    site_folder: str = ""
    days: int = 825
    name: str = ""
    node_port: int = FIRST_NODE_PORT
    flwr: str = ""
    fedloom: str = ""


class _Text(Template):
    """%{name} stands for a value, so that $ keeps its meaning in shell scripts and proxy rules."""

    delimiter = "%"


def write_federation(folder: Path, federation: FederationPlan, sites: Sequence[str]) -> list[Path]:
    """Write all of it; returns the folders to hand out: ca, server and those of the sites.

    Raises ConfigError for a wrong address, path or name, or where the folder holds anything already.
    """
    host, _ = parse_endpoint(federation.address, "--address")
    federation = federation.model_copy(update={"flwr": installed("flwr"), "fedloom": installed("fedloom")})
    _check_names(sites)
    _check_texts(federation)
    server = folder / "server"
    values = _server_values(federation, server, sites)
    for name in sites:
        _site_folder(folder, federation, name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already; nothing is written over. For a further site: federation add")
    ca_key, server_key = new_key(), new_key()
    ca = new_ca(ca_key, f"fedloom CA for {host}")
    write_new(folder / RECORD, tomli_w.dumps(federation.model_dump()))
    write_new(folder / "ca" / "ca.pem", certificate_pem(ca))
    write_new(folder / "ca" / "ca.key", key_pem(ca_key), 0o600)
    write_new(folder / ".gitignore", "*\n")
    write_new(server / ".gitignore", "*\n")
    write_new(server / "ca.pem", certificate_pem(ca))
    certificate = new_server(server_key, server_hosts(federation), ca, ca_key, federation.days)
    write_new(server / "server.pem", certificate_pem(certificate))
    write_new(server / "server.key", key_pem(server_key), 0o600)
    for name, mode in _SERVER_FILES.items():
        write_new(server / _file_name(name, federation), _text(name, values), mode)
    write_new(server / "flwr" / "config.toml", _text("config.toml", values))
    write_new(server / RECORD, tomli_w.dumps(federation.model_dump()))
    made = [_write_site(folder, federation, name, number) for number, name in enumerate(sites)]
    return [folder / "ca", server, *made]


def add_site(folder: Path, site: str, public_key: Path | None = None) -> Path:
    """Write the files of one more site; returns its folder.

    public_key: of a key pair that the site made itself; without it one is made here. Raises ConfigError where the
    folder was not made by `write_federation`, or has such a site.
    """
    federation = read_plan(folder)
    _check_names([site])
    _check_texts(federation)
    parse_endpoint(federation.address, f"address in {folder / RECORD}:")
    _site_folder(folder, federation, site)
    if public_key is not None:
        read_public_key(public_key)
    if (folder / "sites" / site).exists() or (folder / "server" / "nodes" / f"{site}.pub").exists():
        again = f"`fedloom federation rotate {folder} {site}` gives it a new key"
        raise ConfigError(f"{folder} has a site {site!r} already; nothing is written over: {again}")
    number = len(list(folder.glob("sites/*")))  # a port of its own follows from it
    return _write_site(folder, federation, site, number, public_key)


def read_plan(folder: Path) -> FederationPlan:
    """What `write_federation` was asked for. Raises ConfigError where the folder was not made by it."""
    path = folder / RECORD
    try:
        return FederationPlan.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `fedloom federation init {folder}` makes one") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def site_file_names(federation: FederationPlan) -> list[str]:
    """The files of a site that `write_federation` and `add_site` write; the key lacks where the site made its own."""
    named = [_file_name(file, federation) for file in _SITE_FILES]
    return [*named, "node.key", "node.pub", "ca.pem", RECORD, ".gitignore"]


def server_hosts(federation: FederationPlan) -> list[str]:
    """The names and addresses that the server's certificate is for."""
    asked = (("--address", federation.address), ("--listen", federation.listen))
    return [*(parse_endpoint(text, option)[0] for option, text in asked), "localhost", "127.0.0.1"]


def parse_endpoint(text: str, option: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[IPv6]:port". Raises ConfigError, which names the option, for anything else."""
    match = re.fullmatch(_ENDPOINT, text)
    if not match or not 0 < int(match[3]) < 65536 or not _is_host(match[1], match[2]):
        raise ConfigError(f"{option} {text!r}: expected host:port, such as fed.example.org:9443")
    return match[1] or match[2], int(match[3])


def _is_host(address: str | None, name: str | None) -> bool:
    """Whether this is an IPv6 address, or else a name or an IPv4 address."""
    try:
        if address is not None:
            return bool(ipaddress.IPv6Address(address))
        if name is not None and re.fullmatch(r"[0-9.]+", name):
            return bool(ipaddress.IPv4Address(name))
    except ValueError:
        return False
    return name is not None and len(name) <= 253  # RFC 1035: the longest name that DNS has


def _check_names(sites: Sequence[str]) -> None:
    for name in sites:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise ConfigError(f"site {name!r}: expected up to 64 letters, digits, dots, dashes or underscores")
    if len(set(sites)) != len(sites) or not sites:
        raise ConfigError(f"sites {', '.join(sites) or 'none'}: expected one or more different names (--site NAME)")


def _check_texts(federation: FederationPlan) -> None:
    """Raises ConfigError for a value that no file can hold, whatever quotes are around it."""
    for field, option in (("model", "--model"), ("data", "--data"), ("site_folder", "--site-folder")):
        text = getattr(federation, field)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{option} {text!r}: expected text that UTF-8 can hold") from None
    # Names of users have 32 characters at most, and this one becomes "fedloom-NAME-site".
    if federation.name and not re.fullmatch(r"[a-z][a-z0-9-]{0,15}", federation.name):
        raise ConfigError(f"--name {federation.name!r}: expected up to 16 small letters, digits or dashes")
    if not 1024 <= federation.node_port <= 60000:
        raise ConfigError(f"--node-port {federation.node_port}: expected a port from 1024 to 60000")


def _unquoted(path: Path | str, option: str, advice: str) -> str:
    """The path itself. Raises ConfigError, which names the option, where it needs quotes in a unit or proxy rule."""
    text = str(path)
    if not re.fullmatch(_PATH, text):
        allowed = "an absolute path of letters, digits and . _ / ~ + @ -"
        raise ConfigError(f"{option} {text!r}: systemd units and proxy rules need {allowed}; {advice}")
    return text


def _site_folder(folder: Path, federation: FederationPlan, name: str) -> str:
    """Where the site will keep its files. Raises ConfigError where no systemd unit can name that."""
    if federation.site_folder:
        kept = federation.site_folder.replace("{site}", name)
        return _unquoted(kept, "--site-folder", "choose another folder at the site")
    made = (folder / "sites" / name).absolute()
    return _unquoted(made, "DIR", "choose another DIR, or say with --site-folder where the site will keep its files")


def _programs() -> str:
    """The folder of the programs of this Python's environment."""
    return _unquoted(Path(sys.executable).parent, "the folder of this Python,", "install fedloom in another one")


def _write_site(
    folder: Path, federation: FederationPlan, name: str, number: int, public_key: Path | None = None
) -> Path:
    site = folder / "sites" / name
    if public_key is None:
        private, public = node_key_pair(new_key())
        write_new(site / "node.key", private, 0o600)
    else:
        public = read_public_key(public_key)
    write_new(site / "node.pub", public)
    write_new(folder / "server" / "nodes" / f"{name}.pub", public)
    write_new(site / "ca.pem", (folder / "ca" / "ca.pem").read_bytes())
    write_new(site / RECORD, tomli_w.dumps(federation.model_copy(update={"data": "", "site_folder": ""}).model_dump()))
    write_new(site / ".gitignore", "*\n")
    values: dict[str, Value] = {
        "name": name,
        "address": federation.address,
        "model": federation.model,
        "data": federation.data.replace("{site}", name),
        "folder": _site_folder(folder, federation, name),
        "node_port": federation.node_port + number,
        "bin": _programs(),
        "unit": _unit(federation),
        "logger": f"{_unit(federation)}-site",
        "group": f"{_unit(federation)}-node",
    }
    for file, mode in _SITE_FILES.items():
        write_new(site / _file_name(file, federation), _text(file, values), mode)
    return site


def _unit(federation: FederationPlan) -> str:
    """What the names of units and users begin with."""
    return f"fedloom-{federation.name}" if federation.name else "fedloom"


def _file_name(template: str, federation: FederationPlan) -> str:
    """A unit is called after its federation, so that those of several fit into one folder of systemd's."""
    return _unit(federation) + template.removeprefix("fedloom") if template.startswith("fedloom") else template


def _server_values(federation: FederationPlan, server: Path, sites: Sequence[str]) -> dict[str, Value]:
    host, port = parse_endpoint(federation.address, "--address")
    listen_host, listen_port = parse_endpoint(federation.listen, "--listen")
    return {
        "address": federation.address,
        "host": host,
        "port": port,
        "listen": federation.listen,
        "listen_host": listen_host,
        "listen_port": listen_port,
        "folder": _unquoted(server.absolute(), "DIR", "choose another DIR; the folder may be moved afterwards"),
        "authority": str(server.absolute() / "ca.pem"),
        "bin": _programs(),
        "model": federation.model,
        "unit": _unit(federation),
        "logger": _unit(federation),
        "participants": list(sites),
        "quorum": max(1, len(sites) - 1),
    }


def _text(name: str, values: Mapping[str, Value]) -> str:
    """A file as its template has it; in TOML every value stands with its quotes."""
    template = resources.files("fedloom.deploy") / "templates" / name
    written = _toml if name.endswith(".toml") else str
    return _Text(template.read_text(encoding="utf-8")).substitute({key: written(v) for key, v in values.items()})


def _toml(value: Value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return tomli_w.dumps({"_": value}).removeprefix("_ = ").removesuffix("\n")


def write_new(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a new file that has this mode from its first byte on. Raises FileExistsError where one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
