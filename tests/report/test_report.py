"""Reports: the numbers are those of the ledger, the pictures are drawn, the page stands alone."""

import io
import math
import re

import pytest
from PIL import Image
from rich.console import Console

from fedloom.errors import CheckpointError
from fedloom.records.ledger import Evaluation, Ledger, Note, RunRow, Training, Transfer
from fedloom.records.session import Answer, End, Session
from fedloom.report import summarise, write_report
from fedloom.report.facts import human_seconds
from fedloom.report.figure import draw_comparison, draw_curve
from fedloom.report.numbers import MEAN, human_bytes, interval
from fedloom.report.outcome import describe_decline
from fedloom.report.page.markup import read_asset
from fedloom.report.tables import closing_tables, comparison_rows, cost_sentence, traffic_table
from page_reading import Reading, page_text

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
    assert lines["mean"] == ["mean", *["20.0", "→", "65.0", "+45.0", "1.000", "→", "1.000"]]
    assert lines["ada"] == ["ada", "3", "300", "B", "467", "B", "0", "B", "2.2", "KiB", "0.667"]
    assert lines["all"] == ["all", "6", "300", "B", "467", "B", "0", "B", "4.5", "KiB"]


def test_of_many_clients_the_closing_table_lists_a_few():
    ledger = [RunRow("fedit", "m", (), 1, 10, 0)]
    for number in range(150):
        ledger += [Training(1, f"c{number:03d}", 1.0, 1, 5), Transfer(1, f"c{number:03d}", "up", "update", 100)]
    report = summarise(ledger)
    lines = [line.split() for line in printed(traffic_table(report)).splitlines() if line.split()]
    listed = [line[0] for line in lines if line[0].startswith("c0") or line[0].startswith("c1")]
    assert listed == [*(f"c{number:03d}" for number in range(10)), "c148", "c149"]
    assert ["…", "and", "138", "more", "in", "the", "report"] in lines
    assert lines[-1] == ["all", "150", "100", "B", "0", "B", "0", "B", "14.6", "KiB"]
    text = page_text(ledger)
    assert all(f"<th scope=row>c{number:03d}</th><td>5</td>" in text for number in range(150))


def circumstances():
    yield Session(0, "2026-01-02T03:04:05+00:00", '[lora]\nr = "<b>"\n', {"torch": "2.9"}, {"cpus": "2 CPUs"})
    yield Answer(0, "bank", "What is\n<1>?", "one", "two")
    yield Session(3, "2026-01-03T03:04:05+00:00", '[lora]\nr = "<b>"\n', {"torch": "2.9"}, {"cpus": "8 CPUs"}, 60.0)
    yield Answer(3, "bank", "What is\n<1>?", "one", "one")
    yield End(3, "finished", "", 3723.0)


def test_the_page_says_when_where_how_long_with_what_and_for_what():
    text = page_text([*rows(), *circumstances()])
    parsed = Reading(text)
    for words in ("2026-01-02 03:04:05 UTC, resumed once", "1 h 2 min", "8 CPUs", "torch 2.9", 'r = "<b>"'):
        assert words in parsed.text
    assert '<details id="settings">' in text and "b" not in parsed.tags
    assert "<td>What is\n&lt;1&gt;?</td><td>one</td><td>two</td><td>one</td>" in text
    assert "<th scope=row>ada</th><td>100</td><td>3</td>" in text
    # 2300 bytes are the busiest client's run: 71.9 ms at 256 kbit/s, 1.8 ms at 10 Mbit/s.
    assert "<th scope=row>256 kbit/s</th><td>&lt; 0.1 s</td><td>&lt; 0.1 s</td><td>0.1 s</td>" in text
    notes = text[text.index("<h2>Notes</h2>") :]
    assert '<table class="words">' in notes[: notes.index("</table>")]


def test_a_run_that_failed_says_so_on_its_page():
    text = page_text([*rows(), End(3, "failed", "lower <it>", 3.0)])
    assert 'role="alert"' in text and ">This run failed: lower &lt;it&gt;</p>" in text
    assert "This run failed" not in page_text([*rows(), End(3, "finished")])


def test_a_run_that_was_given_more_rounds_is_reported_with_them():
    ledger = [*rows(rounds=2), RunRow("fedsrd", "model", CLIENTS, 3, VALUES, 0)]
    assert summarise(ledger).run.num_rounds == 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.01, "< 0.1 s"), (2.34, "2.3 s"), (75, "1 min 15 s"), (7261, "2 h 1 min"), (math.nan, "–")]
)
def test_lengths_of_time(seconds, text):
    assert human_seconds(seconds) == text


def test_a_run_without_scores_or_bytes_still_has_a_report():
    held = [RunRow("fedit", "m", (), 1, 10, 0)]
    report = summarise(held)
    assert "Nothing was sent." in printed(closing_tables(report))
    assert "Nothing was sent." in page_text(held)
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
        assert image.width > image.height
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    drawn = [io.BytesIO(), io.BytesIO()]
    for held in drawn:
        draw_curve(report, held, form="svg")
    assert drawn[0].getvalue() == drawn[1].getvalue()


def test_runs_are_overlaid_by_label(tmp_path):
    groups = {
        "fedsrd": [summarise(list(rows(seed))) for seed in range(3)],
        "fedit": [summarise(list(rows(seed, "fedit", 8000, 8000, rounds=2))) for seed in range(2)],
    }
    draw_comparison(groups, tmp_path / "c.svg", form="svg")
    drawn = (tmp_path / "c.svg").read_text()
    assert drawn.count("FillBetweenPolyCollection") == 8  # two labels; exact match and loss; rounds and bytes
    assert "#0072b2" in drawn.lower()


def test_the_page_is_whole_and_needs_no_network(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        for row in rows():
            ledger.append(row)
    report = write_report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = Reading(text)
    assert not {"img", "iframe"} & set(parsed.tags)
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    assert not re.search(r"url\(\s*['\"]?(?!#)", read_asset("page.css"))
    assert "connect-src 'none'" in text and "default-src 'none'" in text
    assert "client <bob> dropped out" in parsed.text
    assert cost_sentence(report) in parsed.text
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def losses_of(*losses):
    """A run of one client whose held-out loss was this, from round 0 on."""
    yield RunRow("fedit", "model", ("ada",), len(losses) - 1, VALUES, 0)
    for round, loss in enumerate(losses):
        if round:
            yield Training(round, "ada", loss, 10, 100, 0.1)
            yield Transfer(round, "ada", "up", "update", 300)
        yield Evaluation(round, "bank", 0.0, loss, examples=50, tokens=400, bytes=1000)


@pytest.mark.parametrize(
    ("losses", "worse"),
    [((5.0, 4.0), False), ((5.0, 5.0), False), ((5.0, 4.0, 5.1), True), ((5.0, math.nan), True), ((5.0,), False)],
)
def test_a_run_that_ends_with_a_higher_loss_than_it_began_has_ended_worse(losses, worse):
    assert summarise(list(losses_of(*losses))).ended_worse is worse


def test_a_run_that_ended_worse_says_so_once():
    """The tables say nothing of it: the run's note does, on the screen, in the ledger and on the page."""
    rows = list(losses_of(5.348, 4.7, 6.069))
    told = describe_decline(rows)
    report = summarise([*rows, Note(2, told)])
    assert "worse" not in printed(closing_tables(report), 200)
    parsed = Reading(page_text([*rows, Note(2, told)]))
    assert parsed.text.count("ended worse than it began") == 1 and told in parsed.text
    assert describe_decline(rows[:2]) == ""


def test_where_exact_match_is_0_throughout_the_loss_leads_tables_page_and_picture():
    held = list(losses_of(6.0, 5.0))
    report = summarise(held)
    lines = [line.split() for line in printed(closing_tables(report), 120).splitlines()]
    assert ["domain", "loss", "change", "bits", "a", "byte"] in lines
    assert ["bank", *["6.000", "→", "5.000", "-1.000"], "3.462", "→", "2.885"] in lines  # 6 · 400 / 1000 / ln 2
    drawn = io.BytesIO()
    draw_curve(report, drawn, form="svg")
    assert drawn.getvalue().count(b'id="axes_') == 2
    parsed = Reading(page_text(held))
    assert parsed.text.index("loss (nats a token)") < parsed.text.index("exact match (%)")


def test_a_page_and_a_picture_of_a_run_without_held_out_data_show_the_training_loss():
    held = [row for row in rows() if not isinstance(row, Evaluation)]
    report = summarise(held)
    assert [point.values["training_loss"][MEAN] for point in report.training] == pytest.approx([2.0, 1.0, 2 / 3])
    assert [point.bytes for point in report.training] == [600, 2600, 4600]
    parsed = Reading(page_text(held))
    assert (
        "training-loss-bytes" in page_text(held)
        and "Nothing is held out" in parsed.text
        and "training loss" in parsed.text
    )
    (row,) = comparison_rows({"fedsrd": [report]})
    assert (row["training loss"], row["up / turn"]) == ("0.667", "300 B")
    draw_comparison({"fedsrd": [report]}, io.BytesIO())  # a logarithm of bytes alone
    draw_comparison({"fedsrd": [summarise([RunRow("fedit", "m", (), 1, 10, 0)])]}, io.BytesIO())  # of nothing at all


def seeded(seed, before, after):
    rows = [Evaluation(0, "bank", 0.0, before), Evaluation(1, "bank", 0.0, after)]
    return summarise([RunRow("m", "model", ("ada",), 1, VALUES, seed), *rows])


def test_differences_are_paired_on_equal_seeds_and_gains_are_shares_of_fedit_s():
    """Seeds differ by a nat, methods by a tenth: intervals of the means overlap, that of the differences does not."""
    groups = {
        "loom": [seeded(s, 6.0, 4.1 + s) for s in (0, 1, 2)],
        "fedit:wire.values=fp32": [seeded(s, 6.0, 4.0 + s) for s in (2, 1, 0)],
        "fedsrd": [seeded(s, 6.0, 4.3 + s) for s in (0, 1)],
        "ffa": [seeded(9, 6.0, 5.0)],
    }
    rows = {row["run"]: row for row in comparison_rows(groups)}
    assert [row["loss against the first"] for row in rows.values()] == ["", "-0.100 ± 0.000", "+0.200 ± 0.000", "–"]
    shares = [row["of fedit:wire.values=fp32's gain"] for row in rows.values()]
    assert shares == ["90.0 %", "100.0 %", "80.0 %", "–"]  # 0.9 of 1.0; 1.2 of 1.5 on seeds 0 and 1; no equal seed
    assert rows["loom"]["loss"] == "5.100 ± 2.484"
