"""A run across machines as its terminal sees it: handed to a SuperLink, watched, left, stopped, and how it ended."""

from __future__ import annotations

import shlex
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from fedloom.cli import closing
from fedloom.errors import CheckpointError, RoundError
from fedloom.records.text import LONG, cell

if TYPE_CHECKING:
    from fedloom.flower.launch import RunState
    from fedloom.records.config import Config
    from fedloom.report.follow import LedgerFeed
    from fedloom.report.live import EventKeeper

START_SECONDS = 60.0
"""After which a run whose folder shows nothing has it on another machine: a server app loads its libraries in less."""
STOP_SECONDS = 90.0
"""How long a stopped run is waited for. Its app learns of it with its next sign of life, within 30 s in flwr 1.41."""


@dataclass(frozen=True, slots=True)
class Command:
    """What was asked, as words of a shell. config: the settings file and what was set beside it."""

    config: tuple[str, ...]
    folder: Path
    run: tuple[str, ...]

    @property
    def again(self) -> str:
        """The command that goes on with the run."""
        return shlex.join([*self.run, "--resume"])

    @property
    def anew(self) -> str:
        """The command that begins it."""
        return shlex.join(self.run)

    def stop(self, number: int) -> str:
        """The command that stops it, by its folder where that is known to be here."""
        from fedloom.flower.control import read_number

        with suppress(CheckpointError):
            if read_number(self.folder) == number:
                return shlex.join(["fedloom", "stop", str(self.folder)])
        return shlex.join(["fedloom", "stop", *self.config, "--run", str(number)])


class Onlooker:
    """Shows a submitted run: from its ledger, and where that is not to be seen from here, by its state alone."""

    def __init__(self, view: EventKeeper, feed: LedgerFeed, folder: Path) -> None:
        self.view, self.feed, self.folder = view, feed, folder
        self.number = 0
        self._running: float | None = None  # since when it is known to run
        self._seen = True
        self._away = False

    def submitted(self, number: int) -> None:
        """The SuperLink has the run."""
        self.number = number
        self.view.loading = f"run {number} is submitted; the server's app is starting …"
        self.view.say(f"run {number} is submitted")

    def look(self, state: RunState | None) -> None:
        """What there is to show now. state: None while the SuperLink does not answer."""
        self.feed.look()
        if (state is None) != self._away:
            self._away = state is None
            self.view.say("the SuperLink does not answer" if self._away else "the SuperLink answers again", "yellow")
        if state is None and self._has_ended():
            raise RoundError("the SuperLink does not answer any more")
        if state is None or self.feed.began:
            return
        if state.status == "running":
            self._running = self._running or time.monotonic()
        if self._seen and self._running and time.monotonic() - self._running > START_SECONDS and not self._is_set_up():
            self._seen = False
            text = f"nothing of run {self.number} is to be seen in {self.folder.absolute()} on this machine"
            self.view.say(f"{text}: only its state is followed here; where the folder is, `fedloom status` shows it")
            self.view.loading = f"run {self.number} is running …"

    def lost(self, error: RoundError, command: Command) -> RunState:
        """How a run ended whose SuperLink was lost on the way, by its folder.

        Raises RoundError where that is not to be seen.
        """
        from fedloom.flower.launch import RunState

        if not self.number:
            raise error
        self.feed.close()
        if self.feed.end or self._has_ended():
            ended = "completed" if self.feed.end and self.feed.end.status == "finished" else "failed"
            return RunState("finished", ended, f"{error}, and the server's app has ended", 0, 0)
        look = shlex.join(["fedloom", "status", str(command.folder)])
        raise RoundError(
            f"{error}; run {self.number} may go on without it being seen from here: look with `{look}`\n"
            f"if it has ended, go on with: {command.again}"
        ) from None

    def _has_ended(self) -> bool:
        """Whether the run has begun and nobody plays it any more."""
        from fedloom.records.lock import find_writer

        return self.feed.began and find_writer(self.folder).alive is False

    def _is_set_up(self) -> bool:
        from fedloom.records.lock import find_writer

        return find_writer(self.folder).alive is True


def submit_run(
    console: Console,
    config: Config,
    command: Command,
    *,
    resume: bool = False,
    force: bool = False,
    detach: bool = False,
) -> None:
    """Have a SuperLink run it, and show the run until its end; with `detach` until it is submitted.

    Ctrl-C leaves the run where it is, and says how to look again, to stop it and to go on.
    """
    from fedloom.flower import launch
    from fedloom.flower.settings import check_flower_settings, check_installed
    from fedloom.report.follow import LedgerFeed
    from fedloom.report.live import watch

    check_installed("flower", "flwr")
    check_flower_settings(config)
    check_folder(config, command, resume=resume, force=force)
    number = 0
    try:
        with watch(console, "submitting …") as view:
            onlooker = Onlooker(view, LedgerFeed(view, command.folder), command.folder)
            try:
                with launch.open_control(config) as client:
                    number = launch.submit(client, config, command.folder, resume, force)
                    onlooker.submitted(number)
                    state = None if detach else launch.wait_for_end(client, number, onlooker.look)
            except RoundError as error:
                state = onlooker.lost(error, command)
            onlooker.feed.close()
    except KeyboardInterrupt:  # leaves the run
        leave(console, command, number)
        raise typer.Exit(130) from None
    if state is None:
        leave(console, command, number)
    else:
        close_run(console, command, onlooker, state)


def check_folder(config: Config, command: Command, *, resume: bool, force: bool) -> None:
    """Refuse what the server's app would refuse, where its folder is here: at once, and not after it has started."""
    from fedloom.records.lock import find_writer
    from fedloom.workspace.resumption import check_way

    folder = command.folder
    if not folder.exists():  # it may be on the SuperLink's machine alone
        return
    writer = find_writer(folder)
    if writer.alive:
        named = shlex.quote(str(folder))
        raise CheckpointError(
            f"a run is going on in {folder} (process {writer.pid}): look at it with `fedloom status {named}`, stop it "
            f"with `fedloom stop {named}`, or choose another --out"
        )
    check_way(folder, config, resume=resume, force=force, extend=False)


def close_run(console: Console, command: Command, onlooker: Onlooker, state: RunState) -> None:
    """Print what came of the run. Raises RoundError where it did not complete, with the command that goes on."""
    from fedloom.flower.launch import explain_end

    folder, feed = command.folder, onlooker.feed
    if state.ended == "completed":
        if feed.began:
            console.print(closing.run_tables(folder))
            closing.print_folder(folder, console)
        else:
            where = f"its results are in {folder.absolute()} on the SuperLink's machine"
            console.print(cell(f"run {onlooker.number} is finished; {where}", limit=LONG), soft_wrap=True)
        return
    planned = feed.run.num_rounds if feed.run else 0
    when = f" after round {feed.round} of {planned}" if feed.began else " before it began"
    how = "was interrupted" if state.ended == "stopped" or (feed.end and feed.end.status != "failed") else "failed"
    text = f"run {onlooker.number} in {folder} {how}{when if feed.began or folder.exists() else ''}"
    raise RoundError(f"{text}: {explain_end(state, feed.end)}{_way_on(command, feed.began)}")


def _way_on(command: Command, began: bool) -> str:
    """The line that says how to go on; "" where the reason says it, of a run that was refused."""
    from fedloom.workspace.occupied import find_occupant

    if not command.folder.exists():  # not here, or taken away again, as a run's that could not be set up
        return ""
    try:
        held = find_occupant(command.folder)
    except CheckpointError:
        return ""
    if held is None:
        return f"\nbegin again with: {command.anew}"
    return f"\ngo on with: {command.again}" if began else ""


def leave(console: Console, command: Command, number: int) -> None:
    """Say what can be done with a run that goes on without this terminal. number: 0 where it was not submitted."""
    if not number:
        console.print(cell("interrupted before the run was submitted", "yellow"))
        return
    console.print(cell(f"detached: run {number} goes on at the SuperLink", "yellow"))
    ways = {
        "look again": shlex.join(["fedloom", "status", str(command.folder)]),
        "stop it": command.stop(number),
        "go on once it has ended": command.again,
    }
    for what, line in ways.items():
        console.print(cell(f"  {what + ':':<25}{line}", limit=LONG), soft_wrap=True, highlight=False)


def stop_run(console: Console, path: Path, config: Config, number: int, again: str) -> None:
    """Have a SuperLink stop a run, wait until nobody writes into its folder, and say how to go on.

    path: its folder, or a settings file where that is elsewhere.
    """
    from fedloom.flower import launch
    from fedloom.records.lock import find_writer

    with launch.open_control(config) as client:
        launch.stop(client, number)
    until = time.monotonic() + STOP_SECONDS
    with console.status(f"run {number} is stopped; its server app is ending"):
        while path.is_dir() and find_writer(path).alive and time.monotonic() < until:
            time.sleep(launch.POLL_SECONDS)
    left = path.is_dir() and find_writer(path).alive
    what = f"run {number} is stopped{', but its server app has not ended yet' if left else ''}"
    console.print(cell(f"{what}{f'; go on with: {again}' if again else ''}", limit=LONG), soft_wrap=True)
