"""`fedloom track` and `fedloom push`: a run's numbers to trackers, its adapter to the Hugging Face Hub."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import say, split_words
from fedloom.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from fedloom.adapters.hub import Plan
    from fedloom.trackers.outlets import Destination


def track(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of runs, in progress or over.")],
    to: Annotated[
        str, typer.Option(help="tensorboard, mlflow, wandb, trackio; those of the run's settings if left out.")
    ] = "",
    project: Annotated[
        str | None, typer.Option(help="Project, or experiment, at the tracker.", show_default=False)
    ] = None,
    run_name: Annotated[str | None, typer.Option(help="The run's name there.", show_default=False)] = None,
) -> None:
    """Send the numbers of runs to trackers. What is there already is not sent again; a run in progress is followed."""
    if run_name and len(runs) > 1:
        raise ConfigError("--run-name is for one run: leave it out, and each is called like its folder")
    missing = [folder for folder in runs if not _track(folder, to, project, run_name)]
    if missing:
        raise typer.Exit(1)


def _track(folder: Path, to: str, project: str | None, run_name: str | None) -> bool:
    """Whether all of its points were taken."""
    from fedloom.report.standing import look_at
    from fedloom.trackers.outlets import LOOK_SECONDS, follow_run, say_how_to_send, take_turn
    from fedloom.trackers.sinks import check_trackers

    writer, _ = look_at(folder)
    destination = _destination(folder, to, project, run_name)
    check_trackers(destination.trackers, "--to")
    lock = take_turn(folder, lambda: False)
    if lock is None:
        raise CheckpointError(f"another process sends the points of {folder} already")
    alive = writer.alive

    def is_over() -> bool:
        nonlocal alive
        if alive:
            time.sleep(LOOK_SECONDS)
            alive = look_at(folder)[0].alive
        return not alive

    with lock:
        left = follow_run(folder, destination, is_over, say)
    names = ", ".join(name for name in destination.trackers if name not in left)
    if names:
        say(f"sent {folder} to {names}")
    if left:
        say(say_how_to_send(folder, left))
    return not left


def _destination(folder: Path, to: str, project: str | None, run_name: str | None) -> Destination:
    from fedloom.trackers.outlets import Destination
    from fedloom.workspace.occupied import read_run_settings

    settings = read_run_settings(folder / "config.toml")
    own = settings.output if settings else None
    trackers = tuple(split_words(to)) or (own.report_to if own else ())
    if not trackers:
        raise ConfigError(f"{folder}: its settings name no tracker; give some, such as --to tensorboard,mlflow")
    held = (own.project, own.run_name) if own else ("fedloom", None)
    return Destination(trackers, project or held[0], run_name or held[1] or "")


def push(
    path: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run's folder, or that of an adapter.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hub; made if need be.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; otherwise private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files, their sizes and the card; no network is used.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a LoRA adapter",
    branch: Annotated[str, typer.Option(help="Branch of the repository, made if need be.")] = "main",
) -> None:
    """Put an adapter on the Hugging Face Hub: its own files alone, privately unless asked otherwise."""
    from fedloom.adapters.hub import plan_push, push_adapter

    plan = plan_push(path, repo)
    _show(plan, public)
    if dry_run:
        say(plan.card)
        return
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("nobody is here to say yes: look with --dry-run, then give --yes")
        typer.confirm(f"push to {repo}?", abort=True)
    say(f"pushed to {push_adapter(plan, public=public, message=message, branch=branch)}")


def _show(plan: Plan, public: bool) -> None:
    from fedloom.report.numbers import human_bytes

    say(f"{plan.folder} → {plan.repo}, {'public' if public else 'private'}:")
    for file in plan.files:
        say(f"  {file.name}  {human_bytes(file.stat().st_size)}")
    if plan.left_out:
        say(f"stays here: {', '.join(plan.left_out)}")
    for warning in plan.warnings:
        say(f"note: {warning}")
