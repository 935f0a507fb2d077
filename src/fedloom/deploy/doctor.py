"""`fedloom federation doctor`: is everything in place at this site, or at the server?

It runs in a second: what it looks at is read without loading torch.
"""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from fedloom.deploy import machine, network, versions
from fedloom.deploy.certificates import use_until
from fedloom.deploy.check import Check, fail, ok, try_check, warn
from fedloom.deploy.federation import RECORD, FederationPlan, parse_endpoint, read_plan
from fedloom.deploy.roster import public_keys
from fedloom.errors import ConfigError, FedloomError

if TYPE_CHECKING:
    from fedloom.site.config import SiteConfig

PACKAGES = ("torch", "transformers", "peft", "flwr", "cryptography")
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def examine(path: Path, *, online: bool = True) -> list[Check]:
    """All checks of a site (its SITE.toml, or the folder that holds it) or of the server's folder.

    Raises ConfigError where the path is neither.
    """
    if path.is_dir() and (path / "SITE.toml").is_file():
        path = path / "SITE.toml"
    if path.is_file():
        return check_site(path, online)
    if (path / "superlink.sh").is_file():
        return check_server(path, online)
    raise ConfigError(f"{path} is neither a SITE.toml nor a server's folder, as `fedloom federation init` writes them")


def check_site(path: Path, online: bool) -> list[Check]:
    """What a site needs: settings, model, data, keys, a worker, a way to the SuperLink."""
    from fedloom.site.config import load_site_config

    folder = path.parent
    told = _told(folder)
    found = versions.check_versions(PACKAGES) + _noted(told)
    try:
        config = load_site_config(path)
    except FedloomError as error:
        return [*found, fail(path.name, str(error), "mend this first; the rest was not checked")]
    rules = ", ".join(config.policy.model_dump(exclude_defaults=True)) or "nothing is limited"
    found.append(ok(path.name, f"site {config.name}, policy: {rules}"))
    found.append(try_check("model", "put the base model there", lambda: check_base_model(config.model, told)))
    found.append(try_check("data", "put the examples there", lambda: check_examples(config)))
    found.append(try_check("audit", "find out who touched it before going on", lambda: check_audit(Path(config.state))))
    found.append(machine.check_disk(Path(config.state)))
    ask_again = "ask the federation's operator for this site's files"
    key, ca, superlink = _way_out(folder, config, told)
    found.append(try_check(key.name, ask_again, lambda: machine.check_node_key(key)))
    found.append(try_check(ca.name, ask_again, lambda: machine.check_authority(ca)))
    if config.node is None or (folder / "supernode.sh").is_file():  # `fedloom node` asks no proxy for loopback
        found.append(network.check_proxies(folder / "supernode.sh"))
    if not online:
        return found
    found.append(
        try_check("worker", "fedloom worker SITE.toml", lambda: check_worker(Path(config.socket), config.token_file))
    )
    if not superlink:
        return [*found, warn("SuperLink", "its address is not known here", f"{ask_again} (federation.toml)")]
    return [*found, *network.check_superlink(*parse_endpoint(superlink, "node.superlink"), ca)]


def _way_out(folder: Path, site: SiteConfig, told: FederationPlan | None) -> tuple[Path, Path, str]:
    """(node's key, CA certificate, address of the SuperLink) as SITE.toml has them, or as `federation init` does."""
    if site.node is not None:
        return Path(site.node.key), Path(site.node.root_certificates), site.node.superlink
    return folder / "node.key", folder / "ca.pem", told.address if told else ""


def check_server(folder: Path, online: bool) -> list[Check]:
    """What the server needs: certificate, keys of the sites, the flwr command's settings, a SuperLink that runs."""
    told = _told(folder)
    found = versions.check_versions(PACKAGES) + _noted(told)
    found += [machine.check_disk(folder), machine.check_clock(), network.check_proxies(folder / "superlink.sh")]
    hosts = [parse_endpoint(text, "address")[0] for text in (told.address, told.listen)] if told else []
    try:
        found += machine.check_certificate(folder, hosts)
    except (FedloomError, OSError) as error:
        found.append(fail("certificate", str(error), "fedloom federation renew DIR"))
    found.append(try_check("ca.pem", "take it from ca/ again", lambda: machine.check_authority(folder / "ca.pem")))
    found.append(try_check("sites", "fedloom federation rotate DIR NAME", lambda: check_sites(folder)))
    put = "put its absolute path into flwr/config.toml"
    found.append(try_check("connection", put, lambda: check_connection(folder)))
    if (folder / "state").exists():
        found.append(
            try_check("state", "run the doctor as the SuperLink's user", lambda: check_database(folder / "state"))
        )
    if (folder.parent / "ca" / "ca.key").exists():
        found.append(warn("ca.key", "lies beside the server's folder", "keep it on a machine that is off the network"))
    if (folder / "run.toml").is_file():
        found.append(try_check("model", "put the base model there", lambda: check_base_model(_run_model(folder), told)))
    if online and told:
        found += network.check_superlink(*parse_endpoint(told.listen, "listen"), folder / "ca.pem")
        if told.address != told.listen:
            found += network.check_superlink(*parse_endpoint(told.address, "address"), folder / "ca.pem")
    return found


def check_sites(folder: Path) -> Check:
    """The sites' public keys: there are some, and none is past the time in which it is to be used."""
    keys = public_keys(folder)
    if not keys:
        return fail("sites", "no public key in nodes/", "fedloom federation add DIR NAME")
    today = datetime.now(UTC).date()
    aged = {name: until for name, line in keys.items() if (until := use_until(line))}
    old = [f"{name} ({until})" for name, until in aged.items() if (until - today).days < machine.PLAN_DAYS]
    if old:
        return warn("sites", f"keys to be used until: {', '.join(old)}", "fedloom federation rotate DIR NAME")
    return ok("sites", f"{', '.join(keys)}; register.sh lets them in")


def check_base_model(path: str, told: FederationPlan | None) -> Check:
    """Compare the base model's digest with the one that the server's operator noted."""
    from fedloom.model.identity import base_digest

    if not Path(path).is_dir():
        return fail("model", f"{path}: no such folder", "put the base model there")
    digest = base_digest(path)
    noted = told.model_digest if told else ""
    if not noted:
        return warn("model", f"{path}, digest {digest}", "compare the digest with the server's: they must be equal")
    if digest != noted:
        return fail("model", f"{path}, digest {digest}; the federation's is {noted}", "take the server's files")
    return ok("model", f"{path}, digest {digest}, as the federation's")


def check_examples(site: SiteConfig) -> Check:
    """The site's training examples, read as the worker reads them."""
    from fedloom.model.sources import load_examples

    notes: list[str] = []
    count = len(load_examples(site.data, settings=site.reading(), tell=notes.append))
    found, fewest = f"{count} examples in {site.data}", site.policy.min_examples
    if count < fewest:
        return fail("data", found, f"policy.min_examples is {fewest}")
    return warn("data", found, "; ".join(notes)) if notes else ok("data", found)


def check_audit(state: Path) -> Check:
    """The record of everything that has left, checked line by line."""
    from fedloom.site.audit import AuditTrail

    lines, _, _ = AuditTrail(state / "audit").verify()
    return ok("audit", f"{sum(bool(line.payload) for line in lines)} payloads have left; the record is unbroken")


def check_worker(path: Path, token_file: str) -> Check:
    """Whether a worker answers on its socket, takes the token, and is of this fedloom."""
    from fedloom.site.protocol import SPOKEN, WRONG_TOKEN, Parcel, exchange

    token = Path(token_file).read_text(encoding="utf-8").strip()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10.0)
        connection.connect(str(path))
        try:
            said = exchange(connection, token, Parcel({})).facts
        except TimeoutError:
            return warn("worker", f"takes calls on {path}, but is busy: no answer in 10 s", "look at its log")
    if said.get("error") == WRONG_TOKEN:
        return fail("worker", f"answers on {path}, but refuses the token in {token_file}", "restart the worker")
    if (protocol := said.get("protocol", SPOKEN.newest)) != SPOKEN.newest:
        found = f"answers on {path} in protocol {protocol}; the fedloom that is installed speaks {SPOKEN.newest}"
        return warn("worker", found, "restart the worker, so that it is the one that is installed")
    return ok("worker", f"answers on {path}, and takes the token")


def check_connection(folder: Path) -> Check:
    """Whether the flwr command finds the CA; it takes absolute paths only."""
    import tomllib

    settings = tomllib.loads((folder / "flwr" / "config.toml").read_text(encoding="utf-8"))
    named = Path(settings["superlink"]["federation"]["root-certificates"])
    if not named.is_file():
        return fail("connection", f"flwr/config.toml names {named}, which is not there", "put the right path into it")
    return ok("connection", f"flwr/config.toml names {named}")


def check_database(state: Path) -> Check:
    """Whether the SuperLink's user alone may enter the folder of its database, which every update passes through."""
    mode = state.stat().st_mode & 0o777
    if mode & 0o077:
        return fail("state", f"mode {mode:04o}: others may read every update", f"chmod -R go-rwx {state}")
    return ok("state", f"mode {mode:04o}")


def findings_table(checks: list[Check]) -> Table:
    """The findings for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("", "what", "found", "what to do"):
        shown.add_column(column, overflow="fold", no_wrap=column in ("", "what"))
    for check in checks:
        colour = _COLOURS[check.outcome]
        shown.add_row(Text(check.outcome, style=colour), Text(check.what), Text(check.found), Text(check.advice))
    return shown


def _told(folder: Path) -> FederationPlan | None:
    """The plan of the federation that this site or server belongs to, if its file is there."""
    return read_plan(folder) if (folder / RECORD).exists() else None


def _noted(told: FederationPlan | None) -> list[Check]:
    return versions.check_noted(told.flwr, told.fedloom) if told else []


def _run_model(folder: Path) -> str:
    from fedloom.records.configfile import load_config

    return load_config(folder / "run.toml", []).model.path
