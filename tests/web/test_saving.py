"""The buttons below a chart: what they save is what the chart shows, and what the library writes of it."""

import base64
from xml.etree import ElementTree

import pytest

from fedloom.report.page import RunSet, list_figures, write_html
from served_runs import WrittenRun

CATCH = """(() => { window.saved = []; const made = URL.createObjectURL;
  URL.createObjectURL = (blob) => { window.blob = blob; return made(blob); };
  HTMLAnchorElement.prototype.click = function () { window.saved.push([this.download, window.blob]); };
  return true; })()"""
READ = """(async () => { const [name, blob] = window.saved.at(-1); let text = '';
  for (const byte of new Uint8Array(await blob.arrayBuffer())) text += String.fromCharCode(byte);
  window.read = [name, blob.type, btoa(text)]; })()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run, as data and as a file."""
    folder = tmp_path_factory.mktemp("saving")
    page = RunSet([WrittenRun(folder / "run").begin().play(4).end().folder]).read()
    (folder / "page.html").write_text(write_html(page), encoding="utf-8")
    return page, (folder / "page.html").as_uri()


def save(tab, figure, form):
    """(file name, type, content) of what a button saves."""
    count = tab.ask("window.saved.length")
    tab.ask(
        f"[...document.querySelectorAll('#{figure} .tools button')].find((b) => b.textContent === '{form}').click()"
    )
    tab.wait(f"window.saved.length > {count}")
    tab.ask(f"window.read = null, {READ}, true")
    name, kind, content = tab.wait("window.read")
    return name, kind, base64.b64decode(content)


def test_every_chart_is_saved_as_it_is_shown(browser, page):
    data, address = page
    with browser.open(address) as tab:
        tab.ask(CATCH)
        for figure in list_figures(data):
            name, kind, content = save(tab, figure.name, "CSV")
            assert (name, kind) == (f"{figure.name}.csv", "text/csv")
            assert content.decode() == figure.csv(), "the same text as the library's"
            name, kind, content = save(tab, figure.name, "SVG")
            drawing = ElementTree.fromstring(content)  # another program reads it
            assert name.endswith(".svg") and figure.chart.title in "".join(drawing.itertext())
        name, kind, content = save(tab, "loss-rounds", "PNG")
        assert (
            (name, kind) == ("loss-rounds.png", "image/png") and content.startswith(b"\x89PNG") and len(content) > 5000
        )
        assert tab.problems == []
