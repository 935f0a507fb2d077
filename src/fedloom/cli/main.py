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

from fedloom.cli.evaluate import evaluate
from fedloom.cli.federation import app as federation
from fedloom.cli.funnel import Funnel, complaints, run_app
from fedloom.cli.merge import aggregate
from fedloom.cli.options import AsJson, Set
from fedloom.cli.preview import preview
from fedloom.cli.studies import compare, estimate, tune
from fedloom.errors import ConfigError
from fedloom.testbeds import testbed_folder

if TYPE_CHECKING:
    from fedloom.records.config import Config


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
    out: Out = None,
    sets: Set = None,
) -> None:
    """Train a small model that comes with fedloom at four sites, over real bytes."""
    from fedloom.records.configfile import load_config

    chosen = {"method.name": method, "federation.num_rounds": rounds, "federation.seed": seed}
    overrides = [f"{key}={value}" for key, value in chosen.items() if value is not None]
    folder = testbed_folder()
    config = load_config(folder / "demo.toml", [*overrides, *(sets or [])])
    play_local(config, out or free_folder(Path("runs/demo")))


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings; `fedloom init` writes a file.")],
    sets: Set = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    engine: Annotated[
        Engine,
        typer.Option(
            help="local simulates here; flower submits to the SuperLink that [flower] names; flower-sim plays that "
            "engine here, on Flower's Simulation Runtime with Ray."
        ),
    ] = Engine.local,
) -> None:
    """Train the federation that a settings file describes."""
    from fedloom.records.configfile import load_config

    settings = load_config(config, sets or [])
    folder = out or Path(settings.output.dir or Path("runs") / config.stem)
    {Engine.local: play_local, Engine.flower: submit_run, Engine.flower_sim: simulate}[engine](
        settings, folder, resume=resume
    )


@app.command()
def worker(site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="What the site lends, and how.")]) -> None:
    """Hold a site's model and data, and work for the federations that ask, as the site's policy allows."""
    from fedloom.site import config
    from fedloom.site.worker import serve_site

    serve_site(config.load_site_config(site))


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
    """Show how a run stands, and go on showing it until it is over."""
    from fedloom.report.status import follow_run, render_folder

    if once:
        screen.print(render_folder(folder))
    else:
        follow_run(folder, screen)


@app.command()
def init(path: Annotated[Path, typer.Argument(help="File to write.")] = Path("fedloom.toml")) -> None:
    """Write a settings file with every key, its meaning and its default."""
    from fedloom.records.configfile import settings_template

    if path.exists():
        raise ConfigError(f"{path} exists already; give another name: fedloom init other.toml")
    path.write_text(settings_template(), encoding="utf-8")
    screen.print(f"wrote {path}; next: fedloom run {path}", highlight=False, markup=False)


for command in (aggregate, preview, estimate, compare, tune, evaluate):
    app.command()(command)


def play_local(config: Config, folder: Path, *, resume: bool = False) -> None:
    """Run the local engine with its progress on screen, then print the closing tables."""
    from fedloom.report.live import watch

    with explain_resume(folder), watch(screen) as observer:
        from fedloom.server import local

        local.run_local(config, folder, resume=resume, observer=observer)
    from fedloom.cli import inspect as inspection

    screen.print(inspection.run_tables(folder))


def simulate(config: Config, folder: Path, *, resume: bool = False) -> None:
    """Run the Flower engine with Ray's processes on this machine as its sites, then print the closing tables."""
    from fedloom.flower.settings import check_installed
    from fedloom.report.live import watch

    check_installed("simulation", "flwr", "ray")
    with explain_resume(folder), watch(screen) as observer:
        from fedloom.flower.simulated import simulation

        simulation.run_simulated(config, folder, resume=resume, observer=observer)
    from fedloom.cli import inspect as inspection

    screen.print(inspection.run_tables(folder))


def submit_run(config: Config, folder: Path, *, resume: bool = False) -> None:
    """Have a SuperLink run it, wait for the end, and print the closing tables if the run folder is on this machine."""
    from fedloom.flower import launch
    from fedloom.flower.settings import check_flower_settings, check_installed

    check_installed("flower", "flwr")
    check_flower_settings(config)
    with screen.status("submitting"), explain_resume(folder):
        launch.run_on_superlink(config, folder, resume=resume, told=lambda run: screen.print(f"run {run} is submitted"))
    if (folder / "ledger.jsonl").exists():
        from fedloom.cli import inspect as inspection

        screen.print(inspection.run_tables(folder))


@contextmanager
def explain_resume(folder: Path) -> Iterator[None]:
    """Say how to go on where the user interrupts a run."""
    try:
        yield
    except KeyboardInterrupt:
        command = f"fedloom run {shlex.quote(str(folder / 'config.toml'))} --out {shlex.quote(str(folder))} --resume"
        hint = f"; go on with: {command}" if (folder / "config.toml").exists() else " before the run began"
        complaints.print(f"interrupted{hint}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def free_folder(path: Path) -> Path:
    """`path` or, where that is taken, the first free one of path-2, path-3 and so on."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(folder for folder in chain([path], numbered) if not folder.exists())
