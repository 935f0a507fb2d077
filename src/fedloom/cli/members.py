"""`fedloom federation list, add, register, revoke, rotate, renew`: sites by name, their keys, and the certificates."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedloom.cli import bundling
from fedloom.cli.options import say
from fedloom.errors import RoundError

if TYPE_CHECKING:
    from datetime import date

    from rich.table import Table

    from fedloom.deploy.roster import Member

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the federation, or the server's alone.")]
Whole = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the federation, with ca/ and sites/.")]
Site = Annotated[str, typer.Argument(metavar="NAME", help="Name of the site.")]
Offline = Annotated[bool, typer.Option("--offline", help="Change files only; `register` tells the SuperLink later.")]


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this file into the group."""
    app.command("list")(show)
    for command in (add, register, revoke, rotate, renew):
        app.command()(command)


def show(
    folder: Folder,
    offline: Annotated[bool, typer.Option("--offline", help="Look at files only, not at the SuperLink.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the sites: node, whether it is online, when it was last heard of, its key; and when certificates end."""
    from fedloom.deploy import roster

    server = roster.server_folder(folder)
    with nullcontext() if offline else roster.control_of(server) as client:
        members = roster.list_members(server, client)
    ends = roster.ends(server)
    if as_json:
        # Numbers of nodes as text: they have 64 bits, and many programs read JSON's numbers as floats.
        sites = [{**asdict(member), "node": str(member.node or "")} for member in members]
        shown = {"ends": ends, "sites": sites}
        print(json.dumps(shown, indent=2, ensure_ascii=False, default=str))
    else:
        Console().print(_table(members, ends))


def add(
    folder: Whole,
    site: Site,
    public_key: Annotated[Path | None, typer.Option(help="The site's own public key (ECDSA, OpenSSH).")] = None,
    with_bundle: bundling.Bundled = False,
    platform: bundling.Platforms = None,
) -> None:
    """Make the files of one more site."""
    from fedloom.deploy import containers, federation

    bundled = bundling.ask(platform) if with_bundle else None
    made = federation.add_site(folder, site, public_key)
    if (folder / containers.FOLDER).is_dir():
        containers.write_site_containers(folder, site)
    say(f"wrote {made}; then run `fedloom federation register` on the server")
    if bundled:
        bundling.write_first_bundles(folder, [site], bundled)


def register(folder: Folder) -> None:
    """Tell the SuperLink who is let in (nodes/) and who is not (revoked/). What is so already stays as it is."""
    from fedloom.deploy import roster

    server = roster.server_folder(folder)
    with roster.control_of(server) as client:
        steps = roster.bring_in_line(server, client)
    for step in steps:
        say(f"{step.site}: {step.text}")
    if any(step.failed for step in steps):
        raise typer.Exit(1)


def revoke(folder: Folder, site: Site, offline: Offline = False) -> None:
    """Take a site out. Its key never comes back; `rotate` gives the site a new one."""
    from fedloom.deploy import roster

    kept = roster.revoke(folder, site)
    say(f"{site}: its public key is in {kept} now")
    if not offline:
        _tell_superlink(folder, site)
    say(f"a revoked key never comes back; to let {site} in again: fedloom federation rotate {folder} {site}")


def rotate(
    folder: Folder,
    site: Site,
    public_key: Annotated[
        Path | None, typer.Option(help="The site's new public key, where it made the pair itself.")
    ] = None,
    offline: Offline = False,
) -> None:
    """Give a site a new key and take the old one out; also lets a revoked site in again."""
    from fedloom.deploy import roster

    made = roster.rotate(folder, site, public_key)
    if not offline:
        _tell_superlink(folder, site)
    if made is not None:
        say(f"carry {made} and {made.with_name('node.pub')} to {site} on a safe way, in place of its own")
    say(f"then restart the node at {site}: its old key is refused" + (" once the SuperLink knows" if offline else ""))


def renew(
    folder: Whole,
    days: Annotated[int, typer.Option(min=1, max=3650, help="Days that the new certificate is valid.")] = 825,
    ca: Annotated[bool, typer.Option("--ca", help="A new CA: ca.pem holds both, until --drop-old-ca.")] = False,
    drop_old_ca: Annotated[bool, typer.Option("--drop-old-ca", help="Trust the new CA alone from now on.")] = False,
) -> None:
    """Make a new key and certificate for the server, or change the CA in three steps without locking a site out."""
    from fedloom.deploy import renewal

    if ca and drop_old_ca:
        raise typer.BadParameter("--ca begins a change and --drop-old-ca ends it: one at a time")
    if ca:
        _carry(renewal.renew_ca(folder), f"when all have it: fedloom federation renew {folder}")
    elif drop_old_ca:
        _carry(renewal.drop_old_ca(folder), "the change of the CA is over then")
    else:
        made = renewal.renew_server(folder, days)
        say(f"wrote {made}; take it and server.key to the server, and restart SuperLink and proxy")


def _tell_superlink(folder: Path, site: str) -> None:
    """Bring the SuperLink in line, and show what concerns this site. Raises RoundError, with what to do then."""
    from fedloom.deploy import roster

    server = roster.server_folder(folder)
    try:
        with roster.control_of(server) as client:
            steps = [step for step in roster.bring_in_line(server, client) if step.site == site]
    except RoundError as error:
        later = "take nodes/ and revoked/ to the server, and run `fedloom federation register` there"
        raise RoundError(f"the files are changed, but the SuperLink was not told: {error}; {later}") from None
    for step in steps:
        say(f"{step.site}: {step.text}")


def _carry(files: list[Path], then: str) -> None:
    for path in files:
        say(f"wrote {path}")
    say("carry each to its machine, one after the other, and restart what runs there (SuperLink and proxy, node)")
    say(then)


def _table(members: list[Member], ends: dict[str, date]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    until = f"server's certificate until {ends['server_certificate']}, CA until {ends['ca']}"
    shown = Table(box=box.SIMPLE_HEAD, caption=until, caption_justify="left")
    for column in ("site", "state", "node", "last heard (UTC)", "key", "to be used until"):
        shown.add_column(column, overflow="fold", no_wrap=column in ("site", "state", "node"))
    colours = {"online": "green", "offline": "yellow", "revoked": "red", "not registered": "red"}
    for member in members:
        shown.add_row(
            Text(member.name),
            Text(member.state or "not asked", style=colours.get(member.state, "")),
            str(member.node or ""),
            member.seen.removesuffix("+00:00").replace("T", " "),
            Text(member.key),
            str(member.key_until or ""),
        )
    return shown
