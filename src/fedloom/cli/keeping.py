"""`fedloom federation backup, restore, prune`: copies of what a server or a site knows, and an end of old things."""

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
    path: Annotated[Path, typer.Argument(metavar="SITE.toml|SERVER", help="A site's file, or the server's folder.")],
    days: Annotated[int, typer.Option(min=1, help="Remove what was last used so many days ago.")] = 90,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
) -> None:
    """Remove a site's old jobs that were delivered, never its record; or make the SuperLink's database smaller."""
    from fedloom.deploy.prune import prune as take_away

    for line in take_away(path, days, dry_run=dry_run):
        say(line)
