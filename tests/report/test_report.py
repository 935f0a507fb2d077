"""Reports: the numbers are those of the ledger, the pictures are drawn, the page stands alone."""

import io
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from fedloom.errors import CheckpointError
from fedloom.records.ledger import Evaluation, Ledger, Note, RunRow, Training, Transfer
from fedloom.report import summarise, write_report
from fedloom.report.figure import draw_comparison, draw_curve, draw_svg
from fedloom.report.numbers import MEAN, human_bytes, interval
from fedloom.report.page import page
from fedloom.report.tables import closing_tables, cost_sentence

VALUES = 1000
CLIENTS = ("ada", "bob")


def rows(seed=0, method="fedsrd", up=300, down=700, rounds=3):
    """Two clients; each round every client sends `up` bytes and, from the second round on, receives `down`."""
    yield RunRow(method, "model", CLIENTS, rounds, VALUES, seed)
    for round in range(rounds + 1):
        for client in CLIENTS if round else ():
            if round > 1:
                yield Transfer(round, client, "down", "change", down, {"header": 20, "values": down - 20})
            yield Training(round, client, 2.0 / round, 10, 100, 0.1)
            yield Transfer(round, client, "up", "update", up, {"header": 20, "values": up - 20})
        yield Evaluation(round, "bank", 0.1 + 0.2 * round, 1.0)
        yield Evaluation(round, "lab", 0.3 + 0.1 * round + 0.01 * seed, 1.0)
    yield Note(2, "client <bob> dropped out")


def printed(renderable, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_points_hold_the_score_and_the_bytes_up_to_then():
    report = summarise(list(rows()))
    assert [point.round for point in report.points] == [0, 1, 2, 3]
    assert [point.bytes for point in report.points] == [0, 600, 2600, 4600]
    assert report.points[2].scores == pytest.approx({"bank": 0.5, "lab": 0.5, MEAN: 0.5})
    assert (report.score("bank", 0), report.score("bank")) == pytest.approx((0.1, 0.7))
    assert report.domains == ["bank", "lab"]


def test_the_ratio_is_against_four_bytes_a_value_both_ways():
    report = summarise(list(rows()))
    assert (report.turns, report.totals.bytes) == (6, 6 * 300 + 4 * 700)
    assert report.dense_bytes == (6 + 4) * 4 * VALUES, "six updates, and four times a client was brought in step"
    assert "4.5 KiB in all: 11.5 % of the 39.1 KiB" in cost_sentence(report)
    assert "(8.7 × fewer)" in cost_sentence(report)


def test_dense_fedit_itself_has_ratio_one():
    dense = 4 * VALUES
    ledger = [*rows(up=dense, down=dense), *(Transfer(3, client, "down", "change", dense) for client in CLIENTS)]
    assert "100.0 %" in cost_sentence(summarise(ledger))


def test_the_closing_table_says_what_the_ledger_says():
    text = printed(closing_tables(summarise(list(rows()))))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert lines["mean"] == ["mean", "20.0", "65.0", "+45.0"]
    assert lines["ada"] == ["ada", "3", "300", "B", "467", "B", "0", "B", "2.2", "KiB", "0.667"]
    assert lines["all"] == ["all", "6", "300", "B", "467", "B", "0", "B", "4.5", "KiB"]


def test_a_run_without_scores_or_bytes_still_has_a_report():
    report = summarise([RunRow("fedit", "m", (), 1, 10, 0)])
    assert "Nothing was sent." in printed(closing_tables(report))
    assert "Nothing recorded." in page(report)
    draw_curve(report, io.BytesIO())


def test_a_ledger_without_its_first_row_is_refused():
    with pytest.raises(CheckpointError, match=r"runs/x records no run"):
        summarise([Note(1, "hello")], "runs/x")


@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [
        ([0.5], 0.5, 0.0),
        ([1.0, 1.0, 1.0], 1.0, 0.0),
        ([1.0, 2.0, 3.0], 2.0, 4.303 / math.sqrt(3)),
        ([0.0, 2.0], 1.0, 12.706 * math.sqrt(2) / math.sqrt(2)),
        ([float(n % 2) for n in range(100)], 0.5, 1.96 * math.sqrt(0.25 * 100 / 99) / 10),
    ],
)
def test_intervals_are_student_s(values, mean, half):
    assert interval(values) == pytest.approx((mean, half))


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (3 << 29, "1.50 GiB")]
)
def test_sizes(size, text):
    assert human_bytes(size) == text


def test_pictures_are_drawn_and_are_the_same_for_the_same_report(tmp_path):
    report = summarise(list(rows()))
    draw_curve(report, tmp_path / "a.png")
    draw_curve(report, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 2 * image.height
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert draw_svg(report) == draw_svg(report)


def test_runs_are_overlaid_by_label(tmp_path):
    groups = {
        "fedsrd": [summarise(list(rows(seed))) for seed in range(3)],
        "fedit": [summarise(list(rows(seed, "fedit", 8000, 8000, rounds=2))) for seed in range(2)],
    }
    draw_comparison(groups, tmp_path / "c.svg", form="svg")
    drawn = (tmp_path / "c.svg").read_text()
    assert drawn.count("FillBetweenPolyCollection") == 4
    assert "#0072b2" in drawn.lower()


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href") or name.endswith(":href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_no_network(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        for row in rows():
            ledger.append(row)
    report = write_report(tmp_path)
    parsed = Page()
    parsed.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.search(r"url\(\s*['\"]?(?!#)", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "svg" in parsed.tags
    assert "client <bob> dropped out" in parsed.text
    assert cost_sentence(report) in parsed.text
    assert (tmp_path / "curve.png").stat().st_size > 10_000
