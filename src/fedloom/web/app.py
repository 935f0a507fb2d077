"""The addresses: a page, its data as JSON, its figures as files; for all runs and for each of them.

    /                     all runs side by side, or the one run
    /data.json            what that page asks for again and again; 304 where nothing has changed
    /figures/             its figures, each at /figures/NAME.png, .svg and .csv
    /run/RUN/…            the same of one of several runs

What an address names is looked up among the runs and figures that there are: no part of it is ever a path on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from fedloom.report.page import Figure, Page, list_figures
from fedloom.web.board import Board, Waiting
from fedloom.web.dress import Dressed, figures_page, page_policy, waiting_page
from fedloom.web.guard import Guard

KINDS: dict[str, tuple[str, Callable[[Figure], str | bytes]]] = {
    "png": ("image/png", Figure.png),
    "svg": ("image/svg+xml", Figure.svg),
    "csv": ("text/csv; charset=utf-8", Figure.csv),
}
"""Ending of a figure's file → its type, and what makes it."""
_DRAWING = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
"""The policy of a figure that is opened by itself: an SVG has its colours in style attributes, and runs nothing."""
NO_RUN = "there is no such run here, or not any more; / has those that there are\n"
NO_FIGURE = "the page has no such figure, or not in such a file\n"


def make_app(board: Board, hosts: Iterable[str]) -> ASGIApp:
    """The application. hosts: the names under which it may be asked for (`guard.allowed_hosts`)."""
    answers = (
        ("/", show_page),
        ("/data.json", send_data),
        ("/figures/", list_files),
        ("/figures/{figure}.{kind}", send_figure),
    )
    routes = [
        Route(f"{prefix}{path}", partial(answer, board))
        for path, answer in reversed(answers)  # a run's name may have slashes: the longest address comes first
        for prefix in ("/run/{run:path}", "")
    ]
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False  # an address is there or not
    return Guard(GZipMiddleware(app, minimum_size=1000, compresslevel=5), hosts)


def show_page(board: Board, request: Request) -> Response:
    """The page as HTML, live; before there is something to show, one that says so and looks again."""
    shown = board.look(_name(request))
    if shown is None:
        return PlainTextResponse(NO_RUN, 404)
    text = waiting_page(shown.reason) if isinstance(shown, Waiting) else _dress(board, request, shown).html()
    return HTMLResponse(text, headers={"content-security-policy": page_policy()})


def send_data(board: Board, request: Request) -> Response:
    """What a live page asks for, or 304 where it has that already."""
    shown = board.look(_name(request))
    if not isinstance(shown, Page):
        return _nothing(shown)
    dressed = _dress(board, request, shown)
    return _unless_known(request, dressed.version, lambda: (dressed.update(), "application/json"))


def list_files(board: Board, request: Request) -> Response:
    """Links to the files of all figures of the page."""
    shown = board.look(_name(request))
    if not isinstance(shown, Page):
        return _nothing(shown)
    text = figures_page([(figure.name, figure.chart.title) for figure in list_figures(shown)], list(KINDS))
    return HTMLResponse(text, headers={"content-security-policy": page_policy()})


def send_figure(board: Board, request: Request) -> Response:
    """One figure of the page as a file."""
    shown = board.look(_name(request))
    if not isinstance(shown, Page):
        return _nothing(shown)
    kind, make = KINDS.get(request.path_params["kind"], ("", None))
    figure = next((one for one in list_figures(shown) if one.name == request.path_params["figure"]), None)
    if make is None or figure is None:
        return PlainTextResponse(NO_FIGURE, 404)
    answer = _unless_known(request, shown.version, lambda: (make(figure), kind))
    answer.headers["content-security-policy"] = _DRAWING
    return answer


def _name(request: Request) -> str:
    """The run that is asked for; "" for all of them."""
    return str(request.path_params.get("run", ""))


def _dress(board: Board, request: Request, page: Page) -> Dressed:
    return Dressed(page, board.names(), _name(request))


def _nothing(shown: Waiting | None) -> Response:
    return PlainTextResponse(NO_RUN if shown is None else f"{shown.reason}\n", 404)


def _unless_known(request: Request, version: str, make: Callable[[], tuple[str | bytes, str]]) -> Response:
    """What is made of this version of the page, unless the browser says that it has it."""
    etag = f'W/"{version}"'  # weak: the same page may come packed or not
    headers = {"etag": etag}
    if etag in [known.strip() for known in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    content, kind = make()
    return Response(content, media_type=kind, headers=headers)
