"""Pages from the code say what it says and show what it does; those of the front have what front.csv has."""

import re
from dataclasses import replace

import pytest
from experiments.figures import read_csv
from scripts import make_front_tables, make_method_pages, make_settings_page
from scripts.method_picture import picture, play

from fedloom.methods.table import METHODS, method_options
from fedloom.records.configfile import setting_keys

PAGES = make_method_pages.PAGES
AGAIN = "run `make pages`"


def test_every_method_has_its_words_and_nothing_else_has():
    texts = {path.stem for path in (PAGES / "text").glob("*.md")}
    pages = {path.stem for path in PAGES.glob("*.md")}
    assert texts == pages == {*METHODS, "index"}
    assert {path.stem for path in PAGES.glob("*.svg")} == set(METHODS)


def test_the_table_of_all_methods_is_up_to_date():
    assert (PAGES / "index.md").read_text(encoding="utf-8") == make_method_pages.index(), AGAIN


def test_the_settings_are_up_to_date():
    written = make_settings_page.PAGE.read_text(encoding="utf-8")
    assert written == make_settings_page.page(), AGAIN
    assert all(f"| `{key.partition('.')[2]}` |" in written for key in setting_keys())


@pytest.mark.parametrize("page", make_front_tables.PAGES, ids=lambda page: page.stem)
def test_the_tables_of_the_front_are_those_of_its_figures(page):
    points = read_csv(make_front_tables.DOCS / "front.csv")
    written = page.read_text(encoding="utf-8")
    assert written == make_front_tables.fill(written, points), AGAIN
    assert written != make_front_tables.fill(written, [replace(point, score=1.0) for point in points])


def test_what_is_left_to_play_of_the_front_is_told():
    point = next(p for p in read_csv(make_front_tables.DOCS / "front.csv") if p.testbed == "many")
    told = make_front_tables.missing([point], ["many"])
    assert told.startswith("- many: 10 of 11 entries are still to be played: ") and "20% loom, fedit, fedsrd;" in told


@pytest.mark.parametrize("name", METHODS)
def test_a_page_is_up_to_date(name):
    written = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert written == make_method_pages.page(name), AGAIN
    assert all(f"| `{key}` |" in written for key in method_options(name))


@pytest.mark.parametrize("name", METHODS)
def test_a_picture_shows_what_is_played_today(name):
    """Its words: bytes, tensors and how they travel. A shade may differ where a library rounds otherwise."""
    written = (PAGES / f"{name}.svg").read_text(encoding="utf-8")
    now = picture(name)
    assert len(now) < 40_000
    assert re.findall(r"<text[^>]*>([^<]*)", written) == re.findall(r"<text[^>]*>([^<]*)", now), AGAIN
    assert written.count("<rect") == now.count("<rect")


def test_the_picture_is_of_real_payloads():
    import fedloom

    first, second = play("fedit")
    assert set(first.uploads) == {"ada", "bob"}
    assert f"{len(second.broadcast)} bytes" in picture("fedit")
    mean = fedloom.decode(first.broadcast).entries["module/B"].values
    sent = {name: fedloom.decode(data).entries["module/B"].values for name, data in first.uploads.items()}
    assert ((2 * sent["ada"] + sent["bob"]) / 3 - mean).abs().max() < 1e-6
