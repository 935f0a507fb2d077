"""`--engine flower-sim` on the shipped model: the local engine's bytes, through requests, desks and messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from desks import SITES, TESTBED

from fedloom.configfile import load
from fedloom.engines.flower.direct import simulate
from fedloom.engines.local import run
from fedloom.errors import ConfigError

pytestmark = pytest.mark.flower

SHORT = [
    "federation.num_rounds=2",
    "training.max_steps=2",
    "federation.eval_every=0",
    f"federation.participants={list(SITES)}",
    "data.heldout=null",
    "output.keep_payloads=true",
]


def test_the_simulated_federation_ends_with_the_local_engines_adapter(tmp_path: Path):
    config = load(TESTBED / "demo.toml", SHORT)
    run(config, tmp_path / "local")
    simulate(config, tmp_path / "flower")
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "flower" / file).read_bytes() == (tmp_path / "local" / file).read_bytes()
    kept = [{p.name: p.read_bytes() for p in (tmp_path / out / "payloads").iterdir()} for out in ("flower", "local")]
    assert kept[0] == kept[1]
    delivered = list((tmp_path / "flower" / "sites").glob(f"*/jobs/*/{file}"))
    assert len(delivered) == len(SITES)


def test_a_simulated_site_needs_data_of_its_own(tmp_path: Path):
    with pytest.raises(ConfigError, match="'nobody', which has no data"):
        simulate(load(TESTBED / "demo.toml", ["federation.participants=['bank', 'nobody']"]), tmp_path / "run")
    split = ["data.partitioner=iid", "federation.num_clients=2", "federation.participants=['bank', 'lab']"]
    with pytest.raises(ConfigError, match="flower-sim needs data.partitioner"):
        simulate(load(TESTBED / "demo.toml", split), tmp_path / "run")
