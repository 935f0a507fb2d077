"""The command line: reads arguments, calls the library, prints.

Heavy modules are imported by the command that needs them, so that `fedloom --help` answers at once.
Whatever a command raises as a `FedloomError` becomes one line and exit code 2, here and nowhere else.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from importlib import metadata, resources
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from click import Context
from rich.console import Console
from typer.core import TyperGroup

from fedloom.bench.commands import app as bench
from fedloom.deploy.commands import app as federation
from fedloom.errors import ConfigError, FedloomError
from fedloom.merge.command import aggregate

if TYPE_CHECKING:
    from fedloom.compare import Run
    from fedloom.config import Config


class Engine(StrEnum):
    """Where a run takes place."""

    local = "local"
    flower = "flower"
    flower_sim = "flower-sim"


screen = Console()
complaints = Console(stderr=True)


class Funnel(TyperGroup):
    """The group of commands; turns errors into one line on stderr and an exit code."""

    def invoke(self, ctx: Context) -> object:
        """Run a command. 2: the user's own mistake, 130: interrupted; with --debug errors keep their traceback."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (FedloomError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            complaints.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            complaints.print("interrupted", style="red")
            ctx.exit(130)


app = typer.Typer(
    cls=Funnel,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")
app.command()(aggregate)
app.add_typer(federation, name="federation")

Out = Annotated[Path | None, typer.Option(help="Folder of the run.", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """The `fedloom` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()


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
    from fedloom.configfile import load

    chosen = {"method.name": method, "federation.num_rounds": rounds, "federation.seed": seed}
    overrides = [f"{key}={value}" for key, value in chosen.items() if value is not None]
    with testbed() as folder:
        config = load(folder / "demo.toml", [*overrides, *(sets or [])])
        play(config, out or free_folder(Path("runs/demo")))


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
            "engine in this process."
        ),
    ] = Engine.local,
) -> None:
    """Train the federation that a settings file describes."""
    from fedloom.configfile import load

    settings = load(config, sets or [])
    folder = out or Path(settings.output.dir or Path("runs") / config.stem)
    {Engine.local: play, Engine.flower: submit, Engine.flower_sim: simulate}[engine](settings, folder, resume=resume)


@app.command()
def worker(site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="What the site lends, and how.")]) -> None:
    """Hold a site's model and data, and work for the federations that ask, as the site's policy allows."""
    from fedloom.site import config
    from fedloom.site.worker import serve

    serve(config.load(site))


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods and their settings."""
    from fedloom.inspection import method_rows, method_table

    rows = method_rows()
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        screen.print(method_table(rows))


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A payload, an adapter folder or a run folder.")]) -> None:
    """Say what is in a payload, an adapter or a run."""
    from fedloom.inspection import described

    screen.print(described(path))


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, in progress or over.")],
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
) -> None:
    """Show how a run stands, and go on showing it until it is over."""
    from fedloom.status import follow, shown

    if once:
        screen.print(shown(folder))
    else:
        follow(folder, screen)


@app.command()
def init(path: Annotated[Path, typer.Argument(help="File to write.")] = Path("fedloom.toml")) -> None:
    """Write a settings file with every key, its meaning and its default."""
    from fedloom.configfile import template

    if path.exists():
        raise ConfigError(f"{path} exists already; give another name: fedloom init other.toml")
    path.write_text(template(), encoding="utf-8")
    screen.print(f"wrote {path}; next: fedloom run {path}", highlight=False, markup=False)


@app.command()
def estimate(
    preset: Annotated[str, typer.Option(help="Model whose shapes are used.")] = "llama-3.2-3b",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every client; the preset's if left out.")] = None,
    ranks: Annotated[str, typer.Option(help="A rank for each client: 64,32,16.")] = "",
    clients: Annotated[int, typer.Option(min=1, help="Clients in a round.")] = 4,
    modules: Annotated[str, typer.Option(help="Kinds of modules: q_proj,v_proj.")] = "",
    methods: Annotated[
        list[str] | None,
        typer.Option(help="all, or NAME, NAME:PRESET, NAME:KEY=VALUE,…; joined by commas, or repeated."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings whose model, clients, ranks and method are used instead of a preset.")
    ] = None,
    all_modules: Annotated[bool, typer.Option("--all-modules", help="Play every layer, not one; slow.")] = False,
    sets: Set = None,
    as_json: AsJson = False,
) -> None:
    """Bytes of a round by method, and the server's seconds and memory, before anything is trained."""
    from fedloom import estimate
    from fedloom.bench.commands import numbers, show, words
    from fedloom.compare import variants
    from fedloom.configfile import load

    if config is None:
        held = numbers(ranks, "--ranks") or None
        case = estimate.preset_case(preset, rank=rank, ranks=held, clients=clients, modules=words(modules) or None)
        chosen: list[str] = list(estimate.DEFAULT_METHODS)
    else:
        settings = load(config, sets or [])
        case, chosen = estimate.config_case(settings), [estimate.variant_of(settings)]
    result = estimate.run(case, variants(methods) if methods else chosen, whole=all_modules)
    show(result, estimate.tables, as_json)


@app.command()
def compare(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Settings; the demo's if left out.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="all, or NAME, NAME:PRESET, NAME:KEY=VALUE,…, alone, pooled; joined by commas, or repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of every method.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of the seeds.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    sets: Set = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the runs, table and picture; complete runs in it are kept.")
    ] = Path("runs/compare"),
) -> None:
    """Run several methods on the same data with the same seeds; one table and one picture of score against bytes."""
    from fedloom import compare
    from fedloom.configfile import load
    from fedloom.report import figure, table

    with testbed() as folder:
        chosen = load(config or folder / "demo.toml", sets or [])
        numbers = range(first_seed, first_seed + seeds)
        made = compare.runs(chosen, compare.variants(methods or ["all"]), numbers, out)
        play_all(made, jobs)
    groups = compare.reports(made)
    figure.compare(groups, out / "compare.png")
    rows = table.compared(groups)
    (out / "compare.md").write_text(table.markdown(rows), encoding="utf-8")
    screen.print(table.comparison(rows))


@app.command()
def tune(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Settings; the demo's if left out.")
    ] = None,
    key: Annotated[str, typer.Option(help="The setting to choose.")] = "method.tau",
    values: Annotated[str, typer.Option(help="Its values.")] = "0.8,0.85,0.9,0.95,0.99",
    against: Annotated[list[str] | None, typer.Option(help="Methods that E has to match, as for compare.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of every value.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first; not one that final scores are taken with.")] = 100,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    sets: Set = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and of the chosen settings.")] = Path("runs/tune"),
) -> None:
    """Choose a setting, such as FLoRIST's tau, on the validation split; write settings O (best) and E (cheapest)."""
    from fedloom import compare, tune
    from fedloom.bench.commands import words
    from fedloom.configfile import load
    from fedloom.report import table

    with testbed() as folder:
        settings = load(config or folder / "demo.toml", sets or [])
        others = compare.variants(against or ["fedit"])
        made = tune.search(settings, key, words(values), others, range(first_seed, first_seed + seeds), out)
        play_all(made, jobs)
        groups = compare.reports(made)
        choice = tune.choose(groups, key, words(values))
        files = tune.write(settings, key, choice, out)
    rows = table.compared(groups)
    (out / "tune.md").write_text(table.markdown(rows), encoding="utf-8")
    screen.print(table.comparison(rows))
    for name, found in (("O", choice.best), ("E", choice.efficient)):
        screen.print(
            f"{name}: {key} = {found.value}, {100 * found.score:.1f} % on validation; {files[name]}", markup=False
        )


def play_all(made: Sequence[Run], jobs: int) -> None:
    """Make the runs that are left, saying beforehand how long they will take, and at the end how long they took."""
    from fedloom import compare

    todo = len(compare.left(made))
    screen.print(f"{len(made)} runs, {todo} left; a trial of each first", highlight=False)
    stated, began = compare.expected(made, jobs), time.monotonic()
    screen.print(f"stated: {stated / 60:.1f} min for {todo} runs, {jobs} at a time", highlight=False)
    seconds: list[float] = []

    def finished(run: Run, taken: float) -> None:
        seconds.append(taken)
        left = (todo - len(seconds)) * sum(seconds) / len(seconds) / jobs
        screen.print(f"{run.label}, seed {run.seed}: {taken:.0f} s; about {left / 60:.0f} min left", highlight=False)

    compare.play(made, jobs, finished)
    taken = time.monotonic() - began
    screen.print(f"taken: {taken / 60:.1f} min, where {stated / 60:.1f} were stated", highlight=False)


def play(config: Config, folder: Path, *, resume: bool = False) -> None:
    """Run the local engine with its progress on screen, then print the closing tables."""
    from fedloom.progress import watch

    with resumable(folder), watch(screen) as observer:
        from fedloom.engines import local

        local.run(config, folder, resume=resume, observer=observer)
    from fedloom import inspection

    screen.print(inspection.run(folder))


def simulate(config: Config, folder: Path, *, resume: bool = False) -> None:
    """Play the Flower engine in this process, then print the closing tables."""
    from fedloom.progress import watch

    with resumable(folder), watch(screen) as observer:
        from fedloom.engines.flower import direct

        direct.simulate(config, folder, resume=resume, observer=observer)
    from fedloom import inspection

    screen.print(inspection.run(folder))


def submit(config: Config, folder: Path, *, resume: bool = False) -> None:
    """Have a SuperLink run it, wait for the end, and print the closing tables if the run folder is on this machine."""
    from fedloom.engines.flower import launch
    from fedloom.engines.flower.settings import check

    check(config)
    with screen.status("submitting"), resumable(folder):
        launch.run(config, folder, resume=resume, told=lambda run: screen.print(f"run {run} is submitted"))
    if (folder / "ledger.jsonl").exists():
        from fedloom import inspection

        screen.print(inspection.run(folder))


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
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


def testbed() -> AbstractContextManager[Path]:
    """The folder with the demo's model, data and settings."""
    return resources.as_file(resources.files("fedloom") / "testbed")
