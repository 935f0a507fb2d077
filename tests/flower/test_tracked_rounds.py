"""A run on Flower is tracked as one of the local engine is: by the process that its rounds start."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.records.ledger import read_rows, totals
from tracker_stores import read_tensorboard, settle_at

pytestmark = pytest.mark.flower


def test_a_run_on_flower_sends_its_rounds(toy_federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    settle_at(tmp_path, monkeypatch)
    monkeypatch.setattr("fedloom.trackers.process.PATIENCE", 300.0)
    toy_federation('output.report_to=["tensorboard"]')
    sums = totals(read_rows(tmp_path / "run" / "ledger.jsonl"))
    held = read_tensorboard(tmp_path / "run")
    rounds = {round for name, round in held if name == "bytes/up"}
    assert rounds == sums.by_round.keys() - {0} and {len(values) for values in held.values()} == {1}
    assert sum(held["bytes/up", round][0] for round in rounds) == sums.bytes_up
    assert held["bytes/total_down", max(rounds)] == [sums.bytes_down]
    assert ("clients/tries", 1) in held and ("train/loss", 1) in held
