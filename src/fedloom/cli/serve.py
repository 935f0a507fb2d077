"""`fedloom serve`: runs in the browser."""

from __future__ import annotations

import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.funnel import complaints
from fedloom.cli.options import say

Paths = Annotated[
    list[Path], typer.Argument(metavar="RUN…", help="Folders of runs, in progress or over, or a folder of such.")
]


def serve(
    paths: Paths,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port; 0 for a free one; without it 8321, or a free one if that is taken."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address of this machine to serve at.")] = "127.0.0.1",
    anyone: Annotated[
        bool, typer.Option("--anyone", help="With a --host that other machines reach: whoever reaches it may read.")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Show runs in the browser, live while they go on. Read-only, on this machine; Ctrl-C ends it."""
    from fedloom.web.serving import Service

    service = Service(paths, host=host, port=port, anyone=anyone)
    if service.is_open:
        warning = "warning: there is no password: whoever reaches this address may read these runs"
        complaints.print(warning, style="yellow", soft_wrap=True)
    say(f"{_count(len(service.runs.find()))} at {service.url} (Ctrl-C ends it)")
    if open_page:
        webbrowser.open(service.url)
    with suppress(KeyboardInterrupt):
        service.serve()
    say("no longer served")


def _count(runs: int) -> str:
    return {0: "no run yet", 1: "1 run"}.get(runs, f"{runs} runs")
