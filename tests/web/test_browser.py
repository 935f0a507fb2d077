"""The page in a browser: drawn without a complaint, read with mouse, keys and a phone, and live."""

import pytest
from scripts.browser import DESKTOP, PHONE

from fedloom.report.page import RunSet, write_html
from served_runs import WrittenRun, served

WIDTHS = "[document.documentElement.scrollWidth, innerWidth]"
DRAWN = "[...document.querySelectorAll('[data-chart]')].every((plot) => plot.querySelector('svg path'))"
CENTRE = """(() => { const plot = document.querySelector('[data-chart]'); plot.scrollIntoView({ block: 'center' });
  const box = plot.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"""
TIP = """(() => { const tip = document.querySelector('.tip'); const box = tip && tip.getBoundingClientRect();
  return tip && box.width > 0 && getComputedStyle(tip.parentElement).visibility !== 'hidden' && box.left >= 0
    && box.right <= innerWidth ? tip.textContent : ''; })()"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs that are over and one that is not."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("fedit", "loom"):
        WrittenRun(folder / method, method=method).begin().play(4).end()
    run = WrittenRun(folder / "going").begin().play(2)
    yield folder
    run.end()


@pytest.fixture(scope="module")
def address(folder):
    with served(folder) as service:
        yield service.url


@pytest.fixture(scope="module")
def tab(browser, address):
    """The page of one run that is over."""
    with browser.open(f"{address}run/loom/") as tab:
        yield tab


def is_wider_than_its_window(tab):
    wide, window = tab.ask(WIDTHS)
    return wide > window


def test_every_chart_is_drawn_and_nothing_complained_of(tab):
    assert tab.wait(DRAWN)
    assert tab.ask("document.querySelectorAll('[data-chart]').length") >= 6
    assert tab.ask("document.querySelector('h1').textContent") == "loom"
    assert tab.ask("document.querySelector('.status').textContent") == "finished"
    assert tab.problems == []


def test_a_tooltip_says_what_is_under_the_mouse(tab):
    x, y = tab.ask(CENTRE)
    tab.hover(x - 40, y)
    tab.hover(x, y)
    assert "Round 2" in tab.wait(TIP)
    tab.hover(2, 2)
    tab.wait(f"!{TIP}")
    assert tab.problems == []


def test_keys_reach_the_theme_the_charts_and_their_values(tab):
    tab.ask("document.activeElement.blur(), scrollTo(0, 0)")
    met = []
    for _ in range(60):
        tab.press("Tab")
        met.append(
            tab.ask("document.activeElement.id || document.activeElement.className || document.activeElement.tagName")
        )
        if met[-1] == "theme":
            tab.press("Enter")
        if met[-1] == "plot":
            break
    assert met[0] == "skip" and "theme" in met and met[-1] == "plot"
    assert tab.ask("document.documentElement.dataset.theme") == "dark"
    tab.press("ArrowRight")
    tab.press("ArrowRight")
    assert "Round 1" in tab.wait("document.getElementById('spoken').textContent")
    # What a chart shows stands in a table too, which the next keys open.
    while tab.ask("document.activeElement.tagName") != "SUMMARY":
        tab.press("Tab")
    tab.press("Enter")
    assert tab.wait("document.querySelector('.values[open] td').textContent")
    tab.ask("localStorage.clear()")
    assert tab.problems == []


@pytest.mark.parametrize("path", ["", "run/loom/", "run/going/", "figures/"])
def test_nothing_scrolls_sideways_on_a_phone(browser, address, path):
    with browser.open(address + path, size=PHONE, dark=True) as tab:
        assert not is_wider_than_its_window(tab)
        if path != "figures/":
            tab.ask("for (const one of document.querySelectorAll('details')) one.open = true")
            assert tab.wait(DRAWN)
            assert not is_wider_than_its_window(tab)
            red, green, blue = tab.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
            assert max(red, green, blue) < 60, "a dark page where the phone is dark"
        assert tab.problems == []


def test_a_figure_opens_by_itself_and_is_found_in_the_list(browser, address):
    with browser.open(f"{address}run/loom/figures/") as tab:
        tab.go(tab.ask("document.querySelector('a[href$=svg]').href"))
        assert tab.ask("document.documentElement.tagName") == "svg"
        assert tab.problems == []  # a style that is refused would be one


def test_a_page_follows_its_run_and_those_beside_it(browser, tmp_path):
    run = WrittenRun(tmp_path / "my").begin().play()
    with served(tmp_path) as service, browser.open(service.url, size=DESKTOP) as tab:
        status = "document.querySelector('.status').textContent"
        assert "round 1 of 4" in tab.ask(status)
        tab.ask("window.marked = true, document.querySelector('details').open = true")
        rows = "document.querySelector('.values[open] tbody').rows.length"
        before = tab.wait(rows)
        run.play()
        assert tab.wait(f"{status}.includes('round 2 of 4')")
        assert tab.ask(rows) == before + 1, "the table that was open is open, and has the new round"
        assert tab.ask("document.getElementById('connection').textContent") == "live"
        run.end("failed", "the disk is <b>full</b>")
        reason = tab.wait("document.querySelector('[role=alert]')?.textContent")
        assert "the disk is <b>full</b>" in reason and tab.ask(status) == "failed"
        other = WrittenRun(tmp_path / "other", method="fedit").begin()
        link = "document.querySelector('.runs a[href=\"/run/other/\"]')?.textContent"
        assert tab.wait(link) == "other" and tab.ask(status) == "1 of 2 running"
        other.play().end()
        assert tab.wait(f"{status} === 'all over'") and tab.ask(link) == "other"
        assert tab.ask("window.marked") is True, "the page was never loaded anew"
        assert tab.problems == []


def test_a_page_that_waits_shows_the_run_once_it_has_begun(browser, tmp_path):
    with served(tmp_path) as service, browser.open(service.url) as tab:
        assert "no run here yet" in tab.ask("document.body.textContent")
        WrittenRun(tmp_path / "my").begin().play().end()
        assert tab.wait("document.querySelector('h1')?.textContent") == "fedsrd"
        assert tab.problems == []


def test_what_a_run_brings_along_is_never_run(browser, tmp_path):
    evil = '</script><script>window.hit=1</script><img src=x onerror="window.hit=1">'
    run = WrittenRun(tmp_path / "runs" / evil.replace("/", ""), method=evil).begin().play(2).end("failed", evil)
    WrittenRun(tmp_path / "runs" / "other").begin().play().end()
    (tmp_path / "page.html").write_text(write_html(RunSet([run.folder]).read()), encoding="utf-8")
    with served(tmp_path / "runs") as service, browser.open(service.url) as tab:
        addresses = tab.ask("[...document.querySelectorAll('.runs a')].map((one) => one.href)")
        assert len(addresses) == 3
        for address in [*addresses, (tmp_path / "page.html").as_uri()]:
            tab.go(address)
            assert tab.wait(DRAWN)
            assert evil in tab.ask("document.body.textContent") or address.endswith("other/")
            assert tab.ask("window.hit") is None
        assert tab.problems == []
