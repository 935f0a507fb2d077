"""The page of one run, or of several side by side: as a file, and live.

    runs = RunSet(folders)           # or find_runs(folders), where a folder holds the folders of runs
    page = runs.read()               # Page: plain data, all that the page shows; later calls read the new rows only
    write_html(page)                 # one file: no network, no other file
    write_html(page, live=True)      # the same, which asks for data.json beside it again and again
    write_update(page)               # what data.json answers
    for figure in list_figures(page): figure.csv(), figure.svg(), figure.png()
"""

from fedloom.report.page.figures import Figure, list_figures
from fedloom.report.page.markup import write_html, write_update
from fedloom.report.page.model import Page, Section
from fedloom.report.page.runs import RunSet, find_runs
from fedloom.report.page.static import page

__all__ = ["Figure", "Page", "RunSet", "Section", "find_runs", "list_figures", "page", "write_html", "write_update"]
