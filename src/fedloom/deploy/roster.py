"""Who belongs to a federation, by name: its sites' public keys in files, and the nodes that its SuperLink knows.

server/nodes/NAME.pub are the keys that are to be let in, server/revoked/NAME-….pub those that are to stay out. Files
come first, the SuperLink follows (`bring_in_line`), so that a command that was cut short is ended by doing it again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fedloom.deploy.certificates import (
    fingerprint,
    new_key,
    node_key_pair,
    read_certificate,
    read_public_key,
    use_until,
)
from fedloom.deploy.federation import read_plan, write_new
from fedloom.errors import ConfigError, RoundError
from fedloom.flower.launch import connect_control
from fedloom.flower.nodes import RegisteredNode, list_nodes, register_node, unregister_node
from fedloom.records.config import FlowerSettings


@dataclass(frozen=True, slots=True)
class Member:
    """A site and its key. state: "online", "offline", "registered" (it never came), "not registered" or "revoked"; ""
    where the SuperLink was not asked. seen: ISO 8601, UTC, "" for never.
    """

    name: str
    state: str
    node: int | None
    seen: str
    key: str
    key_until: date | None


@dataclass(frozen=True, slots=True)
class Step:
    """What became of one site, in a sentence; failed: somebody has to do something."""

    site: str
    text: str
    failed: bool = False


def server_folder(folder: Path) -> Path:
    """The server's folder of a federation, or the folder itself where it is that. Raises ConfigError for neither."""
    for server in (folder / "server", folder):
        if (server / "superlink.sh").is_file() or (server / "nodes").is_dir():
            return server
    raise ConfigError(f"{folder} is neither a federation's folder nor its server/: `fedloom federation init` makes one")


def public_keys(server: Path) -> dict[str, bytes]:
    """Site → its public key, a line of OpenSSH's format."""
    return {path.stem: read_public_key(path) for path in sorted((server / "nodes").glob("*.pub"))}


def revoked_keys(server: Path) -> list[tuple[str, bytes]]:
    """(site, public key) of every key that was taken out."""
    found = sorted((server / "revoked").glob("*.pub"))
    return [(path.stem.rpartition("-")[0], read_public_key(path)) for path in found]


def ends(server: Path) -> dict[str, date]:
    """Until when the server's certificate and its CA are valid."""
    files = {"server_certificate": "server.pem", "ca": "ca.pem"}
    return {name: read_certificate(server / file).not_valid_after_utc.date() for name, file in files.items()}


@contextmanager
def control_of(server: Path) -> Iterator[Any]:
    """The Control API of the federation's SuperLink, which answers on its own machine alone. Raises RoundError."""
    rules = FlowerSettings(superlink=read_plan(server).listen, root_certificates=str((server / "ca.pem").absolute()))
    with connect_control(rules) as client:
        yield client


def list_members(server: Path, client: Any | None) -> list[Member]:  # noqa: ANN401 (Flower's client is untyped)
    """Every site with the state of its key; keys that were revoked come last. client None: files alone."""
    nodes = {_plain(node.key): node for node in list_nodes(client)} if client is not None else {}
    held = [(name, line, "not registered") for name, line in public_keys(server).items()]
    out = [(name, line, "revoked") for name, line in revoked_keys(server)]
    members = []
    for name, line, otherwise in [*held, *out]:
        node = nodes.pop(_plain(line), None)
        state = otherwise if otherwise == "revoked" or client is not None else ""
        if node is not None and otherwise != "revoked":
            state = "revoked" if node.status == "unregistered" else node.status
        members.append(_member(name, state, node, line))
    strangers = [node for node in nodes.values() if node.status != "unregistered"]
    return members + [_member(node.name or "(no name)", node.status, node, node.key) for node in strangers]


def bring_in_line(server: Path, client: Any) -> list[Step]:  # noqa: ANN401 (Flower's client is untyped)
    """Let in whom nodes/ names, take out whom revoked/ names; what is so already stays as it is."""
    nodes = {_plain(node.key): node for node in list_nodes(client)}
    keys = public_keys(server)
    steps = []
    for name, line in keys.items():
        node = nodes.get(_plain(line))
        steps.append(_registered(client, name, line) if node is None else _known(name, node))
    named, gone = {_plain(line) for line in keys.values()}, {_plain(line) for _, line in revoked_keys(server)}
    for key, node in nodes.items():
        if key in named or node.status == "unregistered":
            continue
        if key in gone:
            unregister_node(client, node.node_id)
            steps.append(Step(node.name, f"its revoked key is taken out (node {node.node_id})"))
        else:
            text = f"node {node.node_id} is let in with a key that nodes/ does not have: put its key there, or"
            steps.append(Step(node.name or "?", f"{text} `flwr supernode unregister {node.node_id} federation`", True))
    return steps


def revoke(folder: Path, site: str) -> Path:
    """Move a site's public key to those that stay out; returns where it is now. The SuperLink is not told yet."""
    server = server_folder(folder)
    path = server / "nodes" / f"{site}.pub"
    if not path.is_file():
        raise ConfigError(_no_such_site(server, site))
    return _put_away(server, path)


def rotate(folder: Path, site: str, public_key: Path | None = None) -> Path | None:
    """Give a site another key: made here, or its own. Returns the new private key, or None where the site has it.

    The keys before are kept, the site's as *.old. Raises ConfigError for an unknown site, a key that was used before,
    or where a private key would be made on the server.
    """
    server = server_folder(folder)
    own, listed = folder / "sites" / site, server / "nodes" / f"{site}.pub"
    if not own.is_dir() and not listed.is_file() and site not in dict(revoked_keys(server)):
        raise ConfigError(_no_such_site(server, site))
    if public_key is None and not own.is_dir():
        otherwise = f"run this where sites/ is, or let {site} make its key itself (--public-key)"
        raise ConfigError(f"{own} is not here, and a private key is not made on the server: {otherwise}")
    private, public = (b"", read_public_key(public_key)) if public_key else node_key_pair(new_key())
    used = [line for _, line in revoked_keys(server)] + list(public_keys(server).values())
    if _plain(public) in map(_plain, used):
        raise ConfigError(f"{public_key} was used before: a new key is needed (ssh-keygen -t ecdsa -b 384)")
    if listed.is_file():
        _put_away(server, listed)
    write_new(listed, public)
    if own.is_dir():
        for name, content, mode in (("node.key", private, 0o600), ("node.pub", public, 0o644)):
            if (own / name).exists():
                os.replace(own / name, own / f"{name}.old")
            if content:
                write_new(own / name, content, mode)
    return own / "node.key" if private else None


def _put_away(server: Path, path: Path) -> Path:
    """Move a public key from nodes/ to revoked/, under a name of its own."""
    digest = hashlib.sha256(_plain(read_public_key(path))).hexdigest()[:12]
    kept = server / "revoked" / f"{path.stem}-{digest}.pub"
    kept.parent.mkdir(exist_ok=True)
    os.replace(path, kept)
    return kept


def _registered(client: Any, name: str, line: bytes) -> Step:  # noqa: ANN401 (Flower's client is untyped)
    try:
        return Step(name, f"registered as node {register_node(client, name, line)}")
    except RoundError as error:
        return Step(name, str(error), True)


def _known(name: str, node: RegisteredNode) -> Step:
    if node.status == "unregistered":
        again = f"`fedloom federation rotate DIR {name}` makes a new one"
        return Step(name, f"its key was revoked, and a revoked key never comes back: {again}", True)
    if node.name != name:
        return Step(name, f"its key is registered under another name, {node.name!r} (node {node.node_id})", True)
    return Step(name, f"registered already (node {node.node_id}, {node.status})")


def _member(name: str, state: str, node: RegisteredNode | None, line: bytes) -> Member:
    number, seen = (node.node_id, node.seen) if node else (None, "")
    return Member(name, state, number, seen, fingerprint(line), use_until(line))


def _plain(line: bytes) -> bytes:
    """Kind and key of a line in OpenSSH's format, without its comment."""
    return b" ".join(line.split()[:2])


def _no_such_site(server: Path, site: str) -> str:
    known = sorted(public_keys(server))
    near = get_close_matches(site, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no site {site!r} in {server / 'nodes'}: it has {', '.join(known) or 'none'}{hint}"
