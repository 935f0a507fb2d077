"""`fedloom federation backup, restore, prune`: copies of what a server or a site knows, and room again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import say

Kept = Annotated[Path, typer.Argument(metavar="FILE", help="The archive, a tar file.")]


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this file into the group."""
    for command in (backup, restore, prune):
        app.command()(command)


def backup(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A site's folder, the server's, or the federation's.")],
    file: Kept,
    run: Annotated[list[Path] | None, typer.Option(help="A run's folder to take along; repeatable.")] = None,
    while_running: Annotated[
        bool, typer.Option("--while-running", help="Do not wait for a site's worker to be stopped.")
    ] = False,
) -> None:
    """Copy keys, settings and state into one file that its owner alone may read. A SuperLink may go on meanwhile."""
    from fedloom.deploy.backup import back_up

    done = back_up(folder, file, run or [], while_running=while_running)
    say(f"wrote {file}: {done.files} files, {done.bytes / 2**20:.1f} MiB; it holds private keys")
    for path in done.left_out:
        say(f"left out, being no plain file: {path}")


def restore(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    file: Kept,
) -> None:
    """Put a copy back, into a folder that is not there yet."""
    from fedloom.deploy.backup import restore as put_back

    for line in put_back(folder, file):
        say(line)


def prune(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder, or the federation's.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be freed, and change nothing.")] = False,
) -> None:
    """Make the database of a SuperLink that is stopped smaller. Old jobs of a site: `fedloom site prune`."""
    from fedloom.deploy.prune import shrink_database
    from fedloom.deploy.roster import server_folder

    for line in shrink_database(server_folder(folder), dry_run=dry_run):
        say(line)
