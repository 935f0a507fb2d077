"""Commands of `python -m benchmarks` about the whole round: old code against new, long runs, GPUs, a page's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.output import print_result
from fedloom.cli.funnel import complaints
from fedloom.cli.options import AsJson, split_words

Ref = Annotated[str, typer.Argument(metavar="REF", help="Commit of the old code, by any name that git knows.")]
Repeats = Annotated[int, typer.Option(min=1, help="Repeats of each, in turns; the median is kept.")]
WORDS = {"allow_interspersed_args": False, "ignore_unknown_options": True}
"""The options of the command that is compared are its own: those of `against` come before REF."""


def against_command(
    ref: Ref,
    words: Annotated[
        list[str], typer.Argument(metavar="COMMAND…", help="A command of this program: aggregate --rank 8.")
    ],
    repeats: Repeats = 3,
    own: Annotated[bool, typer.Option("--own", help="The old code by the measurements of its day.")] = False,
    rows: Annotated[str, typer.Option(help="The list in the command's JSON that is compared.")] = "rows",
    as_json: AsJson = False,
) -> None:
    """A measurement with the code of a commit and with today's, in turns: every number, old, new and new over old."""
    from benchmarks import against

    print_result(against.run(ref, words, repeats=repeats, own=own, rows=rows), against.tables, as_json)


def goals_command(
    ref: Annotated[
        str, typer.Argument(metavar="[REF]", help="Commit of the old code; today's alone is measured without one.")
    ] = "",
    only: Annotated[str, typer.Option(help="Goals: growth,memory; all if left out.")] = "",
    repeats: Repeats = 1,
    as_json: AsJson = False,
) -> None:
    """What was asked of the whole round, with a commit's code and today's, or today's; says first how long it takes."""
    from benchmarks import goals

    print_result(goals.run(ref, split_words(only), repeats=repeats, told=_tell), goals.tables, as_json)


def page_command(
    pages: Annotated[list[Path], typer.Argument(metavar="PAGE.md…", help="Pages of the documentation.")],
    only: Annotated[str, typer.Option(help="Tables whose command begins so.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured.")] = False,
) -> None:
    """Measure the tables of pages again and write them there; says first how long it takes."""
    from benchmarks import page

    tables = page.tables_of(pages, only)
    _tell(f"{len(tables)} tables: about {sum(table.minutes for table in tables)} minutes")
    for table in tables:
        _tell(f"{table.page}: python -m benchmarks {table.words} ({table.minutes} min)")
        if not dry_run:
            page.write(table)


def course_command(
    clients: Annotated[int, typer.Option(min=1, help="Clients.")] = 4,
    attending: Annotated[int, typer.Option(min=1, help="Clients of a round.")] = 4,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds.")] = 2000,
    adapter: Annotated[str, typer.Option(help="Shapes: tiny, or demo.")] = "tiny",
    method: Annotated[str, typer.Option(help="Method.")] = "fedsrd",
    as_json: AsJson = False,
) -> None:
    """What a run costs beside training: its early and late rounds, and its end with the result's delivery."""
    from benchmarks import course

    result = course.run(clients=clients, attending=attending, rounds=rounds, adapter=adapter, method=method)
    print_result(result, course.tables, as_json)


def device_command(
    preset: Annotated[str, typer.Option(help="Model whose shapes are used.")] = "llama-3.2-3b",
    device: Annotated[str, typer.Option(help="Where adapters are trained: cuda, cuda:1 or cpu.")] = "cuda",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank; the preset's if left out.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="The first layers only.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; the median is kept.")] = 5,
    as_json: AsJson = False,
) -> None:
    """What leaves a GPU after training, and where it is chosen from: seconds of each stage."""
    from benchmarks import device as measured

    print_result(
        measured.run(preset, device=device, rank=rank, layers=layers, repeats=repeats), measured.tables, as_json
    )


def predicted_command(
    preset: Annotated[str, typer.Option(help="Model whose shapes are used.")] = "tinyllama",
    rank: Annotated[int, typer.Option(min=1, help="Rank.")] = 16,
    clients: Annotated[int, typer.Option(min=1, help="Clients.")] = 4,
    methods: Annotated[str, typer.Option(help="Methods: fedsrd,florist.")] = "fedit,fedsrd,fedsrd-e,florist",
    as_json: AsJson = False,
) -> None:
    """What `fedloom estimate` predicts of a server's turn, beside all layers played."""
    from benchmarks import predicted

    result = predicted.run(preset, rank=rank, clients=clients, methods=split_words(methods))
    print_result(result, predicted.tables, as_json)


def _tell(line: str) -> None:
    complaints.print(line, markup=False, highlight=False, soft_wrap=True)


def add_to(app: typer.Typer) -> None:
    """Make them commands of a program."""
    app.command("against", context_settings=WORDS)(against_command)
    app.command("goals")(goals_command)
    app.command("page")(page_command)
    app.command("course")(course_command)
    app.command("device")(device_command)
    app.command("predicted")(predicted_command)
