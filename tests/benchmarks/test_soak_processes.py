"""Ten minutes with a real SuperLink, nodes and workers, and a fault in every round."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed: pip install 'fedloom[flower]'")

from benchmarks.soak import processes
from benchmarks.soak.play import Size
from benchmarks.soak.realfaults import FAULTS

pytestmark = [pytest.mark.flower, pytest.mark.slow]


def test_a_federation_of_real_processes_outlives_a_fault_in_every_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with capsys.disabled():
        result = processes.run(Size(sites=4, rounds=8, seed=3), tmp_path / "soak")
    assert {name: wrong for name, wrong in result["checks"].items() if wrong} == {}
    assert len(result["rounds"]) >= 6 and {one["fault"] for one in result["rounds"]} <= set(FAULTS)
