"""The command line: reads arguments, calls the library, prints.

Heavy modules are imported by the command that needs them, so that `fedloom --help` answers at once.
Errors become one line and an exit code in `funnel`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedloom.cli import closing
from fedloom.cli.attack import attack
from fedloom.cli.evaluate import evaluate
from fedloom.cli.federation import app as federation
from fedloom.cli.funnel import Funnel, complaints, run_app
from fedloom.cli.merge import aggregate
from fedloom.cli.options import AsJson, Devices, Set, Workers, override_local
from fedloom.cli.preview import preview
from fedloom.cli.site import app as site
from fedloom.cli.studies import compare, estimate, tune
from fedloom.cli.submission import Command, stop_run, submit_run
from fedloom.errors import ConfigError
from fedloom.records.text import LONG, cell
from fedloom.testbeds import testbed_folder

if TYPE_CHECKING:
    from fedloom.records.config import Config
    from fedloom.records.events import RunSummary


class Engine(StrEnum):
    """Where a run takes place."""

    local = "local"
    flower = "flower"
    flower_sim = "flower-sim"


screen = Console()


app = typer.Typer(
    cls=Funnel,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(federation, name="federation")
app.add_typer(site, name="site")

Out = Annotated[Path | None, typer.Option(help="Folder of the run.", show_default=False)]


def main() -> None:
    """The `fedloom` command."""
    run_app(app)


def _version(wanted: bool) -> None:
    if wanted:
        screen.print(f"fedloom {metadata.version('fedloom')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Federated LoRA fine-tuning that counts every byte it sends."""


@app.command()
def demo(
    method: Annotated[str | None, typer.Option(help="Another method than the built-in file's.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Another number of rounds.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed.")] = None,
    workers: Workers = None,
    devices: Devices = "",
    out: Out = None,
    sets: Set = None,
) -> None:
    """Train a small model that comes with fedloom at four sites, over real bytes."""
    from fedloom.records.configfile import load_config

    chosen = {"method.name": method, "federation.num_rounds": rounds, "federation.seed": seed}
    overrides = [f"{key}={value}" for key, value in chosen.items() if value is not None]
    folder = testbed_folder()
    config = load_config(folder / "demo.toml", [*overrides, *override_local(workers, devices), *(sets or [])])
    folder = out or free_folder(Path("runs/demo"))
    words = [str(folder / "config.toml"), "--out", str(folder), "--resume"]
    play_local(config, folder, shlex.join(["fedloom", "run", *words]))


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings; `fedloom init` writes a file.")],
    sets: Set = None,
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run, or give a finished one more rounds.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the run in the folder; that one is moved aside, to FOLDER-old.")
    ] = False,
    engine: Annotated[
        Engine,
        typer.Option(
            help="local simulates here; flower submits to the SuperLink that [flower] names; flower-sim plays that "
            "engine here, on Flower's Simulation Runtime with Ray."
        ),
    ] = Engine.local,
    workers: Workers = None,
    devices: Devices = "",
    detach: Annotated[
        bool, typer.Option("--detach", help="flower: return once the run is submitted; it goes on at the SuperLink.")
    ] = False,
) -> None:
    """Train the federation that a settings file describes."""
    from fedloom.records.configfile import load_config

    local = override_local(workers, devices)
    if local and engine is not Engine.local:
        raise ConfigError("--workers and --devices are for --engine local; flower-sim has flower.sim_cpus and sim_gpus")
    sets = [*local, *(sets or [])]
    settings = load_config(config, sets)
    folder = out or Path(settings.output.dir or Path("runs") / config.stem)
    chosen = ["--engine", engine.value] if engine is not Engine.local else []
    words = (str(config), *chain.from_iterable(("--set", text) for text in sets))
    command = Command(words, folder, ("fedloom", "run", *words, "--out", str(folder), *chosen))
    if engine is Engine.flower:
        submit_run(screen, settings, command, resume=resume, force=force, detach=detach)
        return
    if detach:
        raise ConfigError("--detach is for --engine flower: other engines play the run in this process")
    play = {Engine.local: play_local, Engine.flower_sim: simulate}[engine]
    play(settings, folder, command.again, resume=resume, force=force)


@app.command()
def stop(
    path: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or its settings file where that is elsewhere.")
    ],
    run: Annotated[int | None, typer.Option(help="With a settings file: the run's number at the SuperLink.")] = None,
    sets: Set = None,
) -> None:
    """Stop a run that a SuperLink plays; its rounds are kept."""
    from fedloom.flower.control import read_number
    from fedloom.records.configfile import load_config
    from fedloom.report.standing import resume_command

    held = path.is_dir()
    if not held and run is None:
        raise ConfigError(f"{path} is no folder: name the run at the SuperLink too, with --run NUMBER")
    number = run or read_number(path)
    settings = load_config(path / "config.toml" if held else path, sets or [])
    stop_run(screen, path, settings, number, resume_command(path) if held else "")


@app.command()
def worker(site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="What the site lends, and how.")]) -> None:
    """Hold a site's model and data, and work for the federations that ask, as the site's policy allows."""
    from fedloom.site import config
    from fedloom.site.worker import serve_site

    serve_site(config.load_site_config(site))


@app.command()
def node(
    site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="Its [node] says where the SuperLink is.")],
) -> None:
    """Carry messages between a SuperLink and the site's worker, without running code of the server."""
    from fedloom.flower.settings import check_installed

    check_installed("flower", "flwr")
    from fedloom.cli.node import run_node

    run_node(site)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods and their settings."""
    from fedloom.cli.inspect import method_rows, method_table

    rows = method_rows()
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        screen.print(method_table(rows))


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A payload, an adapter folder or a run folder.")]) -> None:
    """Say what is in a payload, an adapter or a run."""
    from fedloom.cli.inspect import describe_path

    screen.print(describe_path(path))


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, in progress or over.")],
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
) -> None:
    """Show how a run stands, and go on showing it until it is over.

    Exit code 1: it has failed, was interrupted, or nobody plays it any more.
    """
    from fedloom.report.status import show_run

    if not show_run(folder, screen, follow=not once).is_well:
        raise typer.Exit(1)


@app.command()
def init(path: Annotated[Path, typer.Argument(help="File to write.")] = Path("fedloom.toml")) -> None:
    """Write a settings file with every key, its meaning and its default."""
    from fedloom.records.configfile import settings_template

    if path.exists():
        raise ConfigError(f"{path} exists already; give another name: fedloom init other.toml")
    path.write_text(settings_template(), encoding="utf-8")
    screen.print(f"wrote {path}; next: fedloom run {path}", highlight=False, markup=False)


for command in (aggregate, preview, estimate, compare, tune, evaluate, attack):
    app.command()(command)


def play_local(config: Config, folder: Path, command: str, *, resume: bool = False, force: bool = False) -> None:
    """Run the local engine with its progress on screen, then say what came of it. command: the one that goes on."""
    from fedloom.report.live import watch
    from fedloom.server.nursery_process import begin_nursery

    with explain_resume(folder, command), watch(screen) as observer, begin_nursery(config) as nursery:
        from fedloom.server import local  # takes seconds, while the workers' process loads the same

        summary = local.run_local(config, folder, resume=resume, force=force, observer=observer, nursery=nursery)
    close_run(summary)


def simulate(config: Config, folder: Path, command: str, *, resume: bool = False, force: bool = False) -> None:
    """Run the Flower engine with Ray's processes on this machine as its sites, then say what came of it."""
    from fedloom.flower.settings import check_installed
    from fedloom.report.live import watch

    check_installed("simulation", "flwr", "ray")
    with explain_resume(folder, command), watch(screen) as observer:
        from fedloom.flower.simulated import simulation

        summary = simulation.run_simulated(config, folder, resume=resume, force=force, observer=observer)
    close_run(summary)


def close_run(summary: RunSummary) -> None:
    """Print the closing tables, what the user should know, and where everything is. Raises RoundError if it failed."""
    if not summary.failure:
        screen.print(closing.run_tables(summary.out))
    for text in summary.notes:
        screen.print(cell(f"note: {text}", "yellow", LONG), soft_wrap=True)
    closing.print_folder(summary.out, screen)
    summary.check()


@contextmanager
def explain_resume(folder: Path, command: str) -> Iterator[None]:
    """Say how to go on where the user interrupts a run."""
    try:
        yield
    except KeyboardInterrupt:
        hint = f"; go on with: {command}" if (folder / "config.toml").exists() else " before the run began"
        complaints.print(f"interrupted{hint}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def free_folder(path: Path) -> Path:
    """`path` or, where that is taken, the first free one of path-2, path-3 and so on."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(folder for folder in chain([path], numbered) if not folder.exists())
