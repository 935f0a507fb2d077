"""The bench of a client's turn measures what it says, on a turn of one step."""

import time
from pathlib import Path

import pytest
import torch
from benchmarks.stages import STAGES, STEPS, Stopwatch

from benchmarks import made_up, turn
from fedloom.errors import ConfigError
from fedloom.model import peft_bridge
from fedloom.records.configfile import load_config

DEMO = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds" / "demo.toml"
SHORT = [
    "training.max_steps=1",
    "training.per_device_train_batch_size=2",
    "federation.participants=['lab']",
    "data.heldout=null",
    "data.validation=null",
]


def test_rows_hold_a_turn_by_stage_and_a_bare_loop_over_the_same_batches():
    result = turn.run([load_config(DEMO, SHORT)], repeats=1)
    (row,) = result["rows"]
    assert (row["client"], row["method"], row["steps"]) == ("lab", "fedsrd", 1)
    stages = row["stages"]
    assert tuple(stages) == STAGES and min(stages.values()) > 0 and row["prepare_s"] > 0
    assert sum(stages.values()) == pytest.approx(row["turn_cpu_s"], rel=0.01)
    assert row["beside_cpu_s"] == pytest.approx(sum(stages.values()) - stages[STEPS])
    assert row["of_ten_steps"] == pytest.approx(row["beside_cpu_s"] / (10 * stages[STEPS]))
    assert row["times_bare"] == row["turn_cpu_s"] / row["bare_cpu_s"] > 0
    assert row["send_cpu_s"] == stages["choose"] + stages["encode"]
    clock = row["clock"]
    assert 0 < clock["beside_s"] < clock["turn_s"]
    assert clock["of_ten_steps"] == pytest.approx(clock["beside_s"] / (10 * (clock["turn_s"] - clock["beside_s"])))
    (whole,) = result["rounds"]
    assert (whole["method"], whole["clients"]) == ("fedsrd", 1) and whole["server_cpu_s"] > 0
    assert whole["times_bare"] == (row["turn_cpu_s"] + whole["server_cpu_s"]) / row["bare_cpu_s"]
    first, second, third = turn.tables(result)
    assert len(third.rows) == 1
    assert "lab" in [str(cell) for cell in first.columns[0].cells] and len(second.columns) == 2 + len(STAGES)


def test_the_bare_loop_trains_what_the_turn_trained(tmp_path):
    setup = turn.prepare(load_config(DEMO, [*SHORT, "training.max_steps=2"]), "")
    (played,) = turn.Played.until(setup, ["lab"], tmp_path, 2)
    drawn = turn.Drawn.of(setup.sites["lab"].data)
    played.play(drawn, Stopwatch())
    trained = peft_bridge.read_adapter(setup.model).tensors()
    played.bare(drawn)
    bare = peft_bridge.read_adapter(setup.model).tensors()
    before = turn.accept(setup.job, played.turn.state, played.broadcast).adapter.tensors()
    for name, tensor in trained.items():
        assert not torch.equal(tensor, before[name])
        torch.testing.assert_close(bare[name], tensor, rtol=1e-4, atol=1e-5)
    played.store.close()


def test_a_model_of_given_shapes_is_made_up(monkeypatch):
    sizes = {
        **made_up.SHAPES["smollm-135m"],
        "hidden_size": 36,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "vocab_size": 640,
    }
    monkeypatch.setattr(made_up, "SHAPES", {"little": sizes})
    config = load_config(DEMO, [*SHORT, "method.name=fedit", "lora.r=2"])
    (row,) = turn.run([config], model="little", repeats=1)["rows"]
    assert row["values"] == 2 * (2 * (36 + 36) + 2 * (36 + 12) + 3 * (36 + 48)) and row["method"] == "fedit"
    with pytest.raises(ConfigError, match="no made-up model 'large': expected little"):
        made_up.made_up_base("large")


def test_packed_rows_are_refused():
    with pytest.raises(ConfigError, match="packing = false"):
        turn.Drawn.of(turn.TokenizedExamples((), 0, rows=((0,),)))


def test_time_counts_for_the_innermost_stage(monkeypatch):
    processor, clock = iter([1.0, 2.0, 4.0, 8.0]), iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(time, "process_time", lambda: next(processor))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    inner = watch.around("inner", lambda value: value)
    with watch.during("outer"):
        assert inner(3) == 3
    assert watch.seconds == {"outer": 1.0 + 4.0, "inner": 2.0}
    assert watch.clock == {"outer": 3.0 + 1.0, "inner": 7.0}
