"""A run's own prediction, beside what it sent: real runs of the demo's model, with little training."""

import json
import random

import pytest
import torch
from typer.testing import CliRunner

from fedloom import testbeds
from fedloom.cli.main import app
from fedloom.errors import CheckpointError, ConfigError
from fedloom.methods.table import build
from fedloom.records.configfile import load_config
from fedloom.records.events import RunFacts, Silent
from fedloom.records.ledger import Aggregation, RunRow, Transfer, read_rows
from fedloom.report.prediction import FILE, RunPrediction, compare_prediction, compare_rows, read_prediction
from fedloom.server.attendance import draw_rounds
from fedloom.server.local import run_local
from fedloom.studies.estimate import case as cases
from fedloom.studies.estimate import foretell
from fedloom.studies.estimate.foretell import Foretelling, foretell_run, predict_run
from fedloom.studies.estimate.schedule import Turns, draw_turns
from fedloom.workspace.regions import plan_regions
from small_testbed import small_testbed
from toy import RANK, SHAPES, initial, ranks
from toy_run import simulation, toy_setup

DEMO = testbeds.testbed_folder() / "demo.toml"
BUFFERED = ["federation.mode=buffered", "federation.buffer_size=2", "federation.pace={ bank = 3 }"]


@pytest.fixture(scope="module")
def beds(tmp_path_factory):
    return small_testbed(tmp_path_factory.mktemp("beds"))


def play(folder, out, *sets):
    config = load_config(folder / "demo.toml", ["data.heldout=null", "data.validation=null", *sets])
    run_local(config, out, observer=Foretelling(Silent()))
    return {row.what: row for row in compare_prediction(out)}


@pytest.mark.parametrize(
    "sets",
    [
        BUFFERED,
        ["federation.regions=3"],
        ["federation.regions=2", "federation.fraction_train=0.5", "federation.drop_out=0.3"],
        ["privacy.secure_aggregation=true", "privacy.bits=20"],
    ],
    ids=["buffered", "regions", "few-in-regions", "secure"],
)
def test_a_run_sends_what_was_foretold(tmp_path, sets):
    """Made-up training, so that values are alike here and there."""
    asked = ["method.name=fedit", "wire.values=fp32", "data.heldout=null", "federation.num_rounds=6", *_toy(sets)]
    config, names = load_config(DEMO, asked), [f"client-{index:04d}" for index in range(6)]
    method = build("fedit")
    case = cases.Case(
        "toy",
        SHAPES,
        dict.fromkeys(names, ranks(RANK)),
        coding="fp32",
        turns=draw_turns(config, names, method),
        regions=plan_regions(config.federation.regions, names, method),
        method="fedit",
        sums=config if config.privacy.secure_aggregation else None,
    )
    with simulation(toy_setup(config, 6, initial()), tmp_path / "run") as run:
        run.play(resume=False)
    told = predict_run(case)
    rows = {row.what: row.ratio for row in compare_rows(told, read_rows(tmp_path / "run" / "ledger.jsonl"))}
    del rows["the server's turn, CPU and clock"]
    assert ("between regions and root" in rows) == bool(case.regions) and len(rows) == 4 + bool(case.regions)
    assert rows == {what: pytest.approx(1, abs=0.06) for what in rows}


def test_a_run_that_everybody_drops_out_of_sends_nothing():
    """Said once: float division by zero, as the run began."""
    nobody = [Turns(("ada", "bob"), (), ())]
    told = predict_run(
        cases.Case("toy", SHAPES, {name: ranks(RANK) for name in ("ada", "bob")}, turns=nobody, method="fedit")
    )
    assert told.bytes == 0 and told.spread == 0


@pytest.mark.usefixtures("no_picture")
def test_a_clients_budget_is_foretold_when_the_run_begins(beds, tmp_path):
    rows = play(beds, tmp_path / "run", "method.name=loom", "wire.client_budget=5KB", "federation.num_rounds=2")
    assert rows["the run"].ratio == pytest.approx(1, abs=0.05)
    told = read_prediction(tmp_path / "run")
    assert told.is_firm and told.remark == "" and len(told.up) == len(told.down) == 2


METHODS = ["fedit", "fedsrd", "florist", "loom", "ffa", "flora", "rolora", "hetlora", "flasc", "fed-dare", "fedex"]
RUNS = {name: [f"method.name={name}"] for name in METHODS} | {
    "buffered": ["method.name=fedit", *BUFFERED],
    "regions": ["method.name=fedit", "federation.regions=2"],
    "client_budget": ["method.name=loom", "wire.client_budget=100% of data"],
}
TRAINING_DECIDES = {"fedsrd", "florist"}
LOOSE = {"flasc": 0.2}
"""It sends floats, and after few steps of Adam these are alike in size, which the wire codes in fewer bytes."""


@pytest.mark.slow
@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("name", RUNS)
def test_the_demo_sends_what_it_said_it_would(tmp_path, name):
    """Within 5 % where training does not decide what is sent; where it does, the prediction says so."""
    rows = play(testbeds.testbed_folder(), tmp_path / "run", *RUNS[name])
    told = read_prediction(tmp_path / "run")
    assert told.is_firm == (name not in TRAINING_DECIDES)
    if told.is_firm:
        assert rows["the run"].ratio == pytest.approx(1, abs=LOOSE.get(name, 0.05))
    else:
        assert "follows from the training" in told.remark
        assert rows["the run"].ratio == pytest.approx(1, abs=1.5 * told.spread)


@pytest.mark.parametrize("sets", [[], ["federation.fraction_train=0.4", "federation.drop_out=0.3"], BUFFERED])
def test_turns_are_drawn_as_the_run_draws_them(tmp_path, sets):
    config = load_config(DEMO, ["method.name=fedit", "data.heldout=null", "federation.num_rounds=5", *_toy(sets)])
    with simulation(toy_setup(config, 6, initial()), tmp_path / "run") as run:
        run.play(resume=False)
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    names = next(row for row in rows if isinstance(row, RunRow)).clients
    turns = draw_turns(config, names, build("fedit"))
    assert len(turns) == 5
    for number, one in enumerate(turns, 1):
        up = [row.client for row in rows if isinstance(row, Transfer) and row.round == number and row.direction == "up"]
        assert sorted(up) == sorted(one.answering)
        assert bool(one.combined) == any(isinstance(row, Aggregation) and row.round == number for row in rows)


def _toy(sets):
    return [text.replace("bank", '"client-0001"') for text in sets]


def test_without_asynchronous_rounds_turns_are_the_attendance():
    config = load_config(DEMO, ["federation.fraction_train=0.5", "federation.drop_out=0.5"])
    names = ("bank", "lab", "shop", "site")
    drawn = list(draw_rounds(config, names))
    turns = draw_turns(config, names, build("fedit"))
    assert [(one.asked, one.answering) for one in turns] == [(one.asked, one.answering) for one in drawn]


def test_the_ratio_is_of_the_rounds_that_were_played():
    told = RunPrediction("fedit", up=(10, 20, 40), down=(0, 5, 5), delivery=7)
    rows = [
        RunRow("fedit", "base", ("a",), 3, 10, 0),
        Transfer(1, "a", "up", "update", 11),
        Aggregation(1, version=1),
        Transfer(2, "a", "down", "change", 6, version=1),
        Transfer(2, "a", "up", "update", 19),
        Aggregation(2, version=2),
        Transfer(3, "a", "down", "change", 99, version=2),
    ]
    found = {row.what: (row.predicted, row.measured) for row in compare_rows(told, rows)}
    assert found == {"up, from clients": (30, 30), "down, in turns": (5, 6)}
    assert told.bytes == 87 and compare_rows(told, rows[:2]) == []


def test_nothing_is_compared_where_nothing_was_predicted(tmp_path):
    assert read_prediction(tmp_path) is None and compare_prediction(tmp_path) == []


@pytest.mark.parametrize(
    "text", ["", "[]", '{"method": "fedit"}', '{"method": 1, "up": [-1], "down": [], "delivery": 0}']
)
def test_a_file_that_is_no_prediction_is_named(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"prediction.json is not what fedloom wrote: .*; `fedloom estimate "):
        read_prediction(tmp_path)


def facts(out, clients=4):
    return RunFacts("fedit", "base", tuple(map(str, range(clients))), 1, 1, out)


def test_no_run_fails_for_its_prediction(tmp_path, monkeypatch):
    Foretelling(Silent()).run_started(facts(tmp_path / "none"))  # no ledger there
    monkeypatch.setattr(foretell, "foretell_quickly", lambda out: pytest.fail("too many clients"))
    Foretelling(Silent()).run_started(facts(tmp_path, clients=1000))
    assert not (tmp_path / FILE).exists()


def test_a_run_has_its_own_settings():
    told = CliRunner().invoke(app, ["estimate", "runs/x", "--methods", "fedit"])
    assert told.exit_code == 2 and "runs/x is a run, which has its own settings" in " ".join(told.output.split())


@pytest.mark.usefixtures("no_picture")
def test_the_command_predicts_a_run_that_has_no_prediction(beds, tmp_path, monkeypatch):
    monkeypatch.setattr(foretell, "MOST_WORK", 0)
    assert play(beds, tmp_path / "run", "method.name=fedit", "federation.num_rounds=1") == {}
    state = torch.random.get_rng_state(), random.getstate()
    first = foretell_run(tmp_path / "run")
    assert torch.equal(torch.random.get_rng_state(), state[0]) and random.getstate() == state[1]
    shown = CliRunner().invoke(app, ["estimate", str(tmp_path / "run"), "--json"])
    told = json.loads(shown.stdout)
    assert told["prediction"]["up"] == list(first.up) and {row["what"] for row in told["compared"]} >= {"the run"}
    seen = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")])
    assert "Predicted and measured" in seen.stdout
    nothing = CliRunner().invoke(app, ["estimate", str(tmp_path)])
    assert nothing.exit_code == 2 and "ledger.jsonl cannot be read" in " ".join(nothing.output.split())


def test_a_folder_without_a_run_is_refused(tmp_path):
    (tmp_path / "ledger.jsonl").touch()
    with pytest.raises(ConfigError, match="holds no run that has begun"):
        cases.run_case(tmp_path)
