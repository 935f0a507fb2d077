"""`python -m benchmarks compress` times a client's turn without its training, whatever the method."""

import json

import pytest
from benchmarks.wan import workload

from benchmarks import compress
from fedloom.compress.budget import Budget
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError
from fedloom.methods.table import build
from fedloom.rounds.turns import Job, client_turn, start

SHAPES = {"layers.0.q_proj": (24, 40), "layers.0.k_proj": (16, 40)}


def test_rows_hold_bytes_and_seconds_of_every_method():
    result = compress.run("tinyllama", ("loom", "fedit"), rank=4, layers=1, repeats=1)
    json.dumps(result, allow_nan=False)
    assert [(row["method"], row["values"]) for row in result["rows"]] == [("loom", "sign"), ("fedit", "int8")]
    for row in result["rows"]:
        assert min(row["first_s"], row["send_s"], row["cpu_s"], row["encode_cpu_s"], result["workload"]["floor_s"]) > 0
        assert row["times_floor"] == row["send_s"] / result["workload"]["floor_s"]
    sizes = [row["up_bytes"] for row in result["rows"]]
    assert 0.95 * 0.42 < sizes[0] / (0.01 * 2 * 4 * result["workload"]["parameters"]) <= 0.42
    assert sizes[1] > 10 * sizes[0]
    assert "loom" in [str(cell) for table in compress.tables(result) for cell in table.columns[0].cells]


def test_what_is_timed_is_the_turn_of_the_engines():
    job = Job(build("loom"), 0, quantize("sign"), budget=Budget(0.05))
    work = workload(SHAPES, 4, 0)
    trained = compress.Trained(work.change, 1, 0.0)
    turn, spent = compress.sending(job, "site", start(job, work.before), trained, 1)
    played = client_turn(job, "site", start(job, work.before), (), lambda state, round, seed: trained, 1)
    assert turn.payload == played.payload and spent.wall > 0


def test_a_budget_reaches_the_methods_that_have_one():
    small, large = (
        compress.run("tinyllama", ("loom",), budget=budget, rank=4, layers=1, repeats=1)["rows"][0]["up_bytes"]
        for budget in ("0.7%", "1.4%")
    )
    assert 1.8 < large / small < 2.2


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="method.name 'lom' is unknown"):
        compress.run("tinyllama", ("lom",), layers=1)
    with pytest.raises(ConfigError, match="at least one method"):
        compress.run("tinyllama", (), layers=1)
