"""The benches of many clients and of catching up, on the shipped model, as short as they can be."""

from __future__ import annotations

from pathlib import Path

from benchmarks import catchup, crowd
from fedloom.records.configfile import load_config

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
SHORT = ["federation.num_rounds=2", "federation.eval_every=0", "training.max_steps=1", "data.heldout=validation"]


def test_a_crowd_is_reached_and_counted():
    config = load_config(
        TESTBED / "demo.toml",
        [*SHORT, "data.partitioner=iid", "federation.num_clients=40", "federation.fraction_train=0.05"],
    )
    result = crowd.run(config)
    assert (result["turns"], result["reached"], [row["round"] for row in result["rows"]]) == (4, 40, [0, 1, 2])
    assert result["bytes_up"] > 0 and crowd.tables(result)[0].row_count == 3


def test_the_way_back_is_shorter_after_a_consolidation():
    config = load_config(TESTBED / "demo.toml", [*SHORT, "method.name=flora"])
    result = catchup.run({"flora": config}, [0.5])
    missed, full, lossy = result["rows"]
    assert lossy["bytes"] < full["bytes"] and lossy["rank"] < full["rank"] and 0 < lossy["lost_energy"] <= 0.5
    assert missed["bytes"] > 0 and catchup.tables(result)[0].row_count == 3
