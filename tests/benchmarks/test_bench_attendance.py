"""The benches of many clients and of catching up, on the shipped model, as short as they can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import catchup, crowd
from fedloom.records.configfile import load_config
from small_testbed import small_testbed

SHORT = ["federation.num_rounds=2", "federation.eval_every=0", "training.max_steps=1", "data.heldout=validation"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_testbed(tmp_path_factory.mktemp("testbed")) / "demo.toml"


def test_a_crowd_is_reached_and_counted(demo: Path):
    config = load_config(
        demo,
        [*SHORT, "data.partitioner=iid", "federation.num_clients=12", "federation.fraction_train=0.17"],
    )
    result = crowd.run(config)
    assert (result["turns"], result["reached"], [row["round"] for row in result["rows"]]) == (4, 12, [0, 1, 2])
    assert result["bytes_up"] > 0 and crowd.tables(result)[0].row_count == 3


def test_the_way_back_is_shorter_after_a_consolidation(demo: Path):
    config = load_config(demo, [*SHORT, "method.name=flora"])
    result = catchup.run({"flora": config}, [0.5])
    missed, full, lossy = result["rows"]
    assert lossy["bytes"] < full["bytes"] and lossy["rank"] < full["rank"] and 0 < lossy["lost_energy"] <= 0.5
    assert missed["bytes"] > 0 and catchup.tables(result)[0].row_count == 3
