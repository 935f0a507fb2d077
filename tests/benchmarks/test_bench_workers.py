"""The bench of worker processes compares what it is given: times of the rounds after the first, and bits."""

import json
from types import SimpleNamespace

import pytest
from benchmarks.workers import Moment

from benchmarks import workers
from fedloom.records.config import Config


@pytest.fixture
def engine(monkeypatch):
    """Plays three rounds of a second, of half a second with workers; `other`: the bytes that workers end with."""
    made = SimpleNamespace(other=b"same", now=0.0)

    def play(config, out, *, observer):
        for _ in range(4):
            made.now += 0.5 if config.local.count else 1.0
            observer.round_finished(0, 3, None, 0, 0, 0.0)
        (out / "adapter").mkdir(parents=True)
        (out / "adapter/adapter_model.safetensors").write_bytes(made.other if config.local.count else b"same")
        (out / "ledger.jsonl").write_text(json.dumps({"row": "training", "seconds": made.now}))

    monkeypatch.setattr(workers, "run_local", play)
    monkeypatch.setattr(Moment, "now", lambda: Moment(made.now, made.now / 4, made.now / 2))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    return made


def test_rows_have_the_gain_and_whether_the_bits_are_equal(engine):
    result = workers.run(Config(), 4, repeats=3, flower=False)
    one, many = result["rows"]
    assert (one["rounds_s"], many["rounds_s"], many["gain"]) == (2.0, 1.0, 2.0)
    assert (many["own_s"], many["others_s"], many["bound_s"]) == (0.25, 0.5, 0.25 + 0.5 / 2)
    assert many["same_adapter"] and many["same_ledger"]
    assert "4 workers" in [str(cell) for cell in workers.tables(result)[0].columns[0].cells]


def test_other_bits_are_told(engine):
    engine.other = b"other"
    _, many = workers.run(Config(), 2, flower=False)["rows"]
    assert not many["same_adapter"] and many["same_ledger"]
