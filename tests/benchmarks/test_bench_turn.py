"""The bench of a client's turn measures what it says, on a turn of one step."""

from pathlib import Path

from benchmarks import turn
from fedloom.records.configfile import load_config

DEMO = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds" / "demo.toml"


def test_rows_hold_a_turn_a_bare_loop_and_their_difference():
    config = load_config(DEMO, ["training.max_steps=1", "federation.participants=['lab']", "data.heldout=null"])
    result = turn.run(config, repeats=1)
    (row,) = result["rows"]
    assert row["client"] == "lab" and row["bare_s"] > 0 and result["prepare_s"] > 0
    assert row["overhead_s"] == row["turn_s"] - row["bare_s"]
    assert 0 < row["train_s"] <= row["turn_s"] and row["send_cpu_s"] > 0
    assert row["send_share"] == row["send_s"] / row["train_s"] > 0
    assert "lab" in [str(cell) for cell in turn.tables(result)[0].columns[0].cells]
