"""The page of one run, or of several side by side: as a file, and live.

`RunSet(folders).read()` gives a `Page`, plain data with all that is shown; called again it reads the new rows only.
`find_runs` finds the folders of runs below others. `write_html(page)` is one file that needs no network and no other
file; with `live=True` it asks for data.json beside it again and again, which `write_update(page)` answers.
`list_figures(page)` has every figure with its CSV, SVG and PNG; `write_figures` writes them all.
"""

from fedloom.report.page.figures import Figure, list_figures, write_figures
from fedloom.report.page.markup import write_html, write_update
from fedloom.report.page.model import Page, Section
from fedloom.report.page.runs import RunSet, find_runs, page_of

__all__ = [
    "Figure",
    "Page",
    "RunSet",
    "Section",
    "find_runs",
    "list_figures",
    "page_of",
    "write_figures",
    "write_html",
    "write_update",
]
