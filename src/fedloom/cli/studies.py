"""`fedloom estimate`, `compare` and `tune`: read arguments, call the library, print."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedloom.cli.options import AsJson, Jobs, Set, print_result, split_numbers, split_words
from fedloom.errors import ConfigError
from fedloom.records.text import LONG, cell
from fedloom.report.numbers import human_bytes
from fedloom.report.scores import NO_SCORE
from fedloom.testbeds import testbed_folder

if TYPE_CHECKING:
    from fedloom.studies.compare import Trial

screen = Console()


def estimate(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="A run's folder: what it was to send, beside what it sent; kept in it."),
    ] = None,
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
    rounds: Annotated[int | None, typer.Option(min=1, help="Of a preset: rounds of a run that all attend.")] = None,
    line: Annotated[
        list[str] | None,
        typer.Option(help="A site's line, NAME=UP/DOWN in Mbit/s: clinic=10/50; repeatable. For hours of the run."),
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Of a GB that the server sends, such as a cloud's egress.")
    ] = None,
    price_up: Annotated[float | None, typer.Option(help="Of a GB that sites send, where their lines cost.")] = None,
    turn_seconds: Annotated[float, typer.Option(help="Seconds of a site's training in a round, for the hours.")] = 0.0,
    all_modules: Annotated[bool, typer.Option("--all-modules", help="Play every layer, not one; slow.")] = False,
    sets: Set = None,
    as_json: AsJson = False,
) -> None:
    """Bytes of a round by method, money, hours and memory of a run, before anything is trained; or a run's own."""
    from fedloom.records.configfile import load_config
    from fedloom.studies import estimate
    from fedloom.studies.compare import parse_variants
    from fedloom.studies.estimate.plan import Terms, parse_lines

    if run is not None:
        if config or methods or sets:
            raise ConfigError(f"{run} is a run, which has its own settings: leave --config, --methods and --set away")
        foretell(run, as_json)
        return
    terms = Terms(parse_lines(line or []), price, price_up, turn_seconds)
    if config is None:
        held = split_numbers(ranks, "--ranks") or None
        case = estimate.preset_case(
            preset, rank=rank, ranks=held, clients=clients, modules=split_words(modules) or None, rounds=rounds
        )
        chosen: list[str] = list(estimate.DEFAULT_METHODS)
    else:
        settings = load_config(config, sets or [])
        case = estimate.config_case(settings)
        chosen = [case.method]
    result = estimate.run_estimate(case, parse_variants(methods) if methods else chosen, whole=all_modules, terms=terms)
    print_result(result, estimate.estimate_tables, as_json)


def foretell(run: Path, as_json: bool) -> None:
    """Predict a run's bytes from its settings, keep that in its folder, and set it beside what was sent."""
    from fedloom.report.prediction import compare_prediction, prediction_table
    from fedloom.studies.estimate.foretell import foretell_run

    told = foretell_run(run)
    rows = compare_prediction(run)
    if as_json:
        found = [{**asdict(row), "ratio": row.ratio} for row in rows]
        print(json.dumps({"prediction": asdict(told), "compared": found}, indent=2))
    elif rows:
        screen.print(prediction_table(told, rows))
    else:
        screen.print(f"predicted: {human_bytes(told.bytes)} in all; the run has not played a round", highlight=False)


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
    jobs: Jobs = 1,
    sets: Set = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the runs, table and picture; complete runs in it are kept.")
    ] = Path("runs/compare"),
) -> None:
    """Run several methods on the same data with the same seeds; one table and one picture of score against bytes."""
    from fedloom.records.configfile import load_config
    from fedloom.report import figure
    from fedloom.report import tables as table
    from fedloom.report.page import RunSet, write_html
    from fedloom.studies import compare

    folder = testbed_folder()
    chosen = load_config(config or folder / "demo.toml", sets or [])
    tried = range(first_seed, first_seed + seeds)
    made = compare.plan_runs(chosen, compare.parse_variants(methods or ["all"]), tried, out)
    play_all(made, jobs)
    groups = compare.read_reports(made)
    figure.draw_comparison(groups, out / "compare.png")
    page = RunSet([trial.folder for trial in made]).read()
    (out / "compare.html").write_text(write_html(page), encoding="utf-8")
    rows = table.comparison_rows(groups)
    (out / "compare.md").write_text(table.to_markdown(rows), encoding="utf-8")
    (out / "compare.csv").write_text(table.to_csv(rows), encoding="utf-8")
    screen.print(table.comparison_tables(groups, width=screen.width))
    screen.print(
        f"in {out}: compare.html, compare.md, compare.csv, compare.png", markup=False, highlight=False, soft_wrap=True
    )


def tune(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Settings; the demo's if left out.")
    ] = None,
    key: Annotated[str, typer.Option(help="The setting to choose.")] = "method.tau",
    values: Annotated[str, typer.Option(help="Its values.")] = "0.8,0.85,0.9,0.95,0.99",
    against: Annotated[list[str] | None, typer.Option(help="Methods that E has to match, as for compare.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of every value.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first; not one that final scores are taken with.")] = 100,
    by: Annotated[
        str | None,
        typer.Option(
            help="Score that decides: exact_match, loss, or one of evaluation.metrics; auto is exact match where it "
            "tells the values apart, otherwise the loss. If left out, evaluation.metric of the settings, which is auto."
        ),
    ] = None,
    jobs: Jobs = 1,
    sets: Set = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and of the chosen settings.")] = Path("runs/tune"),
) -> None:
    """Choose a setting, such as FLoRIST's tau, on the validation split; write settings O (best) and E (cheapest)."""
    from fedloom.records.configfile import load_config
    from fedloom.report import tables as table
    from fedloom.studies import compare, tune

    folder = testbed_folder()
    own = [] if by is None else [f"evaluation.metric={by}"]
    settings = load_config(config or folder / "demo.toml", [*(sets or []), *own])
    others = compare.parse_variants(against or ["fedit"])
    made = tune.plan_search(settings, key, split_words(values), others, range(first_seed, first_seed + seeds), out)
    play_all(made, jobs)
    groups = compare.read_reports(made)
    (out / "tune.md").write_text(table.to_markdown(table.comparison_rows(groups)), encoding="utf-8")
    screen.print(table.comparison_tables(groups, "Validation", screen.width))
    choice = tune.choose(groups, key, split_words(values), settings.evaluation.metric)
    files = tune.write_choice(settings, key, choice, out)
    for note in choice.notes:
        screen.print(cell(note, "yellow", LONG))
    for name, found in (("O", choice.best), ("E", choice.efficient)):
        score = f"{choice.measure.name} {choice.measure.phrase(found.score(choice.measure))}"
        screen.print(cell(f"{name}: {key} = {found.value}, {score} on validation; {files[name]}"))


def play_all(made: Sequence[Trial], jobs: int, alike: Callable[[Trial], str] | None = None) -> None:
    """Make the runs that are left, saying beforehand how long they will take, and at the end how long they took.

    What cannot be played is refused before anything is. alike: the kind of a run, one of which is tried; its variant
    if left out.
    """
    from fedloom.studies import compare
    from fedloom.studies.preflight import check_trials

    check_trials(made)
    if all(run.config.data.heldout is None for run in made):
        screen.print(f"note: {NO_SCORE} The tables will show training loss and bytes.", highlight=False, soft_wrap=True)
    todo = len(compare.runs_left(made))
    if not todo:
        screen.print(f"{len(made)} runs, all of them complete: nothing is played", highlight=False)
        return
    kinds = "each" if alike is None else "each kind"
    screen.print(f"{len(made)} runs, {todo} left; a trial of {kinds} first", highlight=False)
    stated, began = compare.expected_seconds(made, jobs, alike or compare.variant_of), time.monotonic()
    hours = f" ({stated / 3600:.1f} h)" if stated >= 7200 else ""
    screen.print(f"stated: {stated / 60:.1f} min{hours} for {todo} runs, {jobs} at a time", highlight=False)
    seconds: list[float] = []

    def finished(run: Trial, taken: float) -> None:
        seconds.append(taken)
        left = (todo - len(seconds)) * sum(seconds) / len(seconds) / jobs
        screen.print(cell(f"{run.label}, seed {run.seed}: {taken:.0f} s; about {left / 60:.0f} min left"))

    compare.play_runs(made, jobs, finished)
    taken = time.monotonic() - began
    screen.print(f"taken: {taken / 60:.1f} min, where {stated / 60:.1f} were stated", highlight=False)
