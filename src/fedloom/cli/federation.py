"""`fedloom federation`: set a federation up across machines, keep it going, and find out what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedloom.cli import bundling, keeping, members
from fedloom.cli.options import say

if TYPE_CHECKING:
    from fedloom.deploy.check import Check

app = typer.Typer(no_args_is_help=True, help="Set a federation up across machines, keep it going, and check it.")
members.add_commands(app)
keeping.add_commands(app)
app.command()(bundling.bundle)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    site: Annotated[list[str], typer.Option(help="Name of a site; repeatable.")],
    address: Annotated[str, typer.Option(help="host:port that the sites connect to.")],
    listen: Annotated[str, typer.Option(help="host:port that the SuperLink itself listens on.")] = "127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Base model; an existing folder's digest is noted.")] = "./model",
    data: Annotated[str, typer.Option(help="A site's examples; {site} stands for its name.")] = "./data",
    site_folder: Annotated[
        str, typer.Option(help="Where a site will keep its files, for systemd; {site} stands for its name.")
    ] = "",
    days: Annotated[int, typer.Option(min=1, max=3650, help="Days that the server's certificate is valid.")] = 825,
    name: Annotated[
        str, typer.Option(help="Tells several federations on one machine apart: part of the names of units and users.")
    ] = "",
    node_port: Annotated[
        int,
        typer.Option(help="Local port of the first site's SuperNode; the others follow. Another for each federation."),
    ] = 9094,
    with_containers: Annotated[
        bool, typer.Option("--containers", help="Files for containers too: an image, compose files, Helm charts.")
    ] = False,
    with_bundles: bundling.Bundled = False,
    platform: bundling.Platforms = None,
) -> None:
    """Make keys, certificates and all files for the server and for each site."""
    from fedloom.deploy import containers, federation
    from fedloom.model.identity import base_digest

    bundled = bundling.ask(platform) if with_bundles else None
    digest = base_digest(model) if Path(model).is_dir() else ""
    model = str(Path(model).absolute()) if Path(model).is_dir() else model
    asked = federation.FederationPlan(
        address=address,
        listen=listen,
        model=model,
        data=data,
        model_digest=digest,
        site_folder=site_folder,
        days=days,
        name=name,
        node_port=node_port,
    )
    if with_containers:
        containers.check_containers(asked)
    for made in federation.write_federation(folder, asked, site):
        say(f"wrote {made}")
    if with_containers:
        say(f"wrote {containers.write_containers(folder)}, which builds the image; Containerfile says how")
    if bundled:
        bundling.write_first_bundles(folder, site, bundled)
    say("keep ca/ off the network; hand server/ to the server and each folder of sites/ to its site, on a safe way")


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(metavar="SITE.toml|SERVER", help="A site's file, or the server's folder.")],
    offline: Annotated[bool, typer.Option("--offline", help="Check files only, connect to nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a site or the server: one line a check, what to do where something is wrong. Exit code 1 if anything is."""
    from fedloom.deploy.doctor import examine, findings_table

    checks: Sequence[Check] = examine(path, online=not offline)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2, ensure_ascii=False))
    else:
        Console().print(findings_table(list(checks)))
    if any(check.outcome == "fail" for check in checks):
        raise typer.Exit(1)
