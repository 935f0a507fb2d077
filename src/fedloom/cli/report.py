"""`fedloom report`: the page of one run, or of several side by side, as a file; and its figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedloom.errors import ConfigError

screen = Console()


def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Folders of runs, in progress or over, or folders of such.")
    ],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Folder for every figure as PNG, SVG and CSV.", show_default=False)
    ] = None,
) -> None:
    """Write the page of one run, or of several side by side, as one file that needs no network.

    Runs that differ in their seed only are drawn as one line, with its interval.
    """
    from fedloom.report.page import RunSet, find_runs, write_figures, write_html

    folders = find_runs(paths)
    page = RunSet(folders).read()
    check_place(out, folders, over=page.state == "over")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(write_html(page), encoding="utf-8")
    screen.print(f"wrote {out}: {len(folders)} run{'s' * (len(folders) > 1)}", markup=False, highlight=False)
    if figures is not None:
        written = write_figures(page, figures)
        screen.print(f"wrote {len(written)} files in {figures}", markup=False, highlight=False)


def check_place(out: Path, folders: list[Path], *, over: bool) -> None:
    """Raises ConfigError for the page that a run in progress leaves at its end: it marks a run as complete."""
    if not over and out.name == "report.html" and out.resolve().parent in {folder.resolve() for folder in folders}:
        raise ConfigError(f"{out} is what the run itself leaves at its end: give another name, such as --out page.html")
