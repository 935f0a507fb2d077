"""What a run costs beside training, and what an estimate predicts of it: every part is there, and mistakes are told."""

import pytest
from benchmarks.output import to_markdown

from benchmarks import course, predicted
from fedloom.errors import ConfigError
from fedloom.studies.estimate import machine
from fedloom.studies.estimate.presets import PRESETS, Preset


def test_rounds_and_the_end_of_a_run_are_told_apart():
    result = course.run(clients=5, attending=2, rounds=4)
    early, late, end = result["rows"]
    assert [row["part"] for row in result["rows"]] == ["early round", "late round", "end"]
    assert late["times"] == late["cpu_s"] / early["cpu_s"] and end["cpu_s"] > 0
    assert "| 5 | late round |" in to_markdown(course.tables(result)[0])


def test_the_demos_adapter_has_its_number_of_values():
    rank, shapes = course.ADAPTERS["demo"]
    assert rank * sum(m + n for m, n in shapes.values()) == 143_360


@pytest.mark.parametrize("wrong", [{"adapter": "huge"}, {"clients": 2, "attending": 3}, {"rounds": 1}])
def test_runs_that_there_are_not(wrong):
    with pytest.raises(ConfigError, match="expected one of demo, tiny, some of the clients in a round, and two rounds"):
        course.run(**wrong)


def test_what_is_predicted_stands_beside_all_layers(monkeypatch):
    monkeypatch.setattr(machine, "measure_rates", lambda device: machine.Rates(1e9, 1e9, 1e9))
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", 3, {"q_proj": (48, 32), "k_proj": (16, 32)}, rank=4))
    result = predicted.run("tiny", rank=4, clients=2, methods=("fedit", "fedsrd"))
    assert [row["method"] for row in result["rows"]] == ["fedit", "fedsrd"]
    for row in result["rows"]:
        assert min(row["predicted_cpu_s"], row["measured_cpu_s"], row["kernel_cpu_s"], row["share"]) > 0
    (table,) = predicted.tables(result)
    assert to_markdown(table).startswith("| method | predicted CPU s | all layers | ratio |")
