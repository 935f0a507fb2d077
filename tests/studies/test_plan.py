"""`fedloom estimate` as a plan: the arithmetic by hand, and what is refused."""

import io
import json
import math

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.errors import ConfigError
from fedloom.studies import estimate
from fedloom.studies.estimate.case import Case
from fedloom.studies.estimate.course import RunBytes
from fedloom.studies.estimate.plan import USUAL, Line, Terms, parse_lines, plan_run
from fedloom.studies.estimate.rounds import Prediction, Traffic

TOLD = Prediction(
    "fedit", {}, {}, 0.0, "fp32", None, 2.0, memory=1000.0, traffic={"a": Traffic(9, 8, 10, 20)}, states=(30.0, 40.0)
)
COURSE = RunBytes([{"a": (10.0, 0.0), "b": (20.0, 40.0)}, {"a": (10.0, 20.0)}], {"a": 5.0, "b": 25.0}, turns=3)
LINE = Line("clinic", up=80.0, down=160.0)  # 10 and 20 bytes a second


def case(waits=True, base=0):
    return Case("toy", {"m": (4, 6)}, {"a": {"m": 2}, "b": {"m": 3}}, base_bytes=base, waits=waits)


def test_everybody_waits_for_the_slowest_in_every_round():
    plan = plan_run(case(), TOLD, COURSE, Terms([LINE], turn_seconds=100))
    (line,) = plan["lines"]
    # Round 1: a 1 s, b 2 + 2 s; round 2: a 1 + 1 s; each with training and the server's turn; the result to b 1.25 s.
    assert line["run_seconds"] == pytest.approx((4 + 100 + 2) + (2 + 100 + 2) + 1.25)
    assert line["turn_seconds"] == pytest.approx(40 / 3 / 10 + 60 / 3 / 20)
    assert plan["server_cpu_s"] == 4 and plan["server_bytes"] == 1040


def test_where_nobody_waits_the_busiest_site_counts():
    (line,) = plan_run(case(waits=False), TOLD, COURSE, Terms([LINE], turn_seconds=100))["lines"]
    # a: 1 + (1 + 1) + 0.25 s and two trainings; the server's turns.
    assert line["run_seconds"] == pytest.approx(3.25 + 200 + 4)


@pytest.mark.parametrize(
    ("terms", "money"), [({}, None), ({"price": 0.09}, 0.09 * 90), ({"price": 1.0, "price_up": 2.0}, 90 + 2 * 40)]
)
def test_money_is_bytes_at_their_price(terms, money):
    plan = plan_run(case(), TOLD, COURSE, Terms([LINE], **terms))
    assert plan["server_sends_bytes"] == 90 and plan["sites_send_bytes"] == 40
    assert plan["money"] == (None if money is None else pytest.approx(money / 1e9))


def test_a_site_holds_its_base_the_adapter_in_training_and_a_payload_each_way():
    plan = plan_run(case(base=500), TOLD, COURSE, Terms())
    assert plan["site_bytes"] == 500 + 16 * 3 * 10 + 4 * 30 + (10 + 20) and plan["site_has_base"]
    assert [line["name"] for line in plan["lines"]] == [line.name for line in USUAL]


def test_lines_are_read():
    assert parse_lines(["a b=10/50", "c=0.5"]) == (Line("a b", 10e6, 50e6), Line("c", 0.5e6, 0.5e6))
    assert parse_lines([]) == USUAL


@pytest.mark.parametrize("text", ["10/50", "=10", "a=", "a=0/5", "a=1/2/3", "a=-1", "a=nan"])
def test_what_is_no_line_is_refused(text):
    with pytest.raises(ConfigError, match=r"expected NAME=UP/DOWN in Mbit/s, such as clinic=10/50"):
        parse_lines([text])


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_prices_and_seconds_are_numbers_of_zero_or_more(value):
    for key in ("price", "price_up", "turn_seconds"):
        with pytest.raises(ConfigError, match="expected a number of 0 or more"):
            Terms(**{key: value})


def test_the_command_shows_a_plan_of_a_presets_run():
    words = [
        "estimate",
        "--preset",
        "tinyllama",
        "--modules",
        "k_proj",
        "--rank",
        "2",
        "--clients",
        "2",
        "--rounds",
        "5",
    ]
    words += ["--methods", "fedit", "--line", "clinic=10/50", "--line", "hut=0.5", "--price", "90"]
    shown = CliRunner().invoke(app, [*words, "--json"])
    result = json.loads(shown.stdout)
    (row,) = result["rows"]
    plan = row["plan"]
    assert [line["name"] for line in plan["lines"]] == ["clinic", "hut"] and not plan["site_has_base"]
    assert plan["money"] == pytest.approx(90 * plan["server_sends_bytes"] / 1e9)
    assert plan["server_sends_bytes"] + plan["sites_send_bytes"] == pytest.approx(row["run_bytes"], abs=2)
    clinic, hut = (line["run_seconds"] - plan["server_cpu_s"] for line in plan["lines"])
    assert 20 < hut / clinic < 100  # 10 and 50 Mbit/s beside 0.5
    console = Console(file=io.StringIO(), width=220)
    for table in estimate.estimate_tables(result):
        console.print(table)
    text = " ".join(console.file.getvalue().split())
    assert "The run as a plan" in text and "clinic (10/50 Mbit/s)" in text and "money" in text
    alone = estimate.run_estimate(estimate.preset_case("tinyllama", rank=2, clients=2, modules=["k_proj"]), ["fedit"])
    assert alone["rows"][0]["plan"] is None
