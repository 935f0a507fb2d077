"""`python -m benchmarks round`: every client sends a payload of its own, and the parts of a turn add up."""

import pytest

from benchmarks import server_turn
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError
from fedloom.methods.table import build
from fedloom.rounds.job import Job
from fedloom.studies.estimate.presets import preset_named, preset_shapes
from fedloom.wire import decode

SHAPES = dict(list(preset_shapes(preset_named("tinyllama"), layers=1).items())[:1])


def test_no_two_clients_send_the_same():
    job = Job(build("fedsrd"), 0, quantize("int4"))
    state, payloads = server_turn.before_round(job, SHAPES, 2, 3)
    assert state.version == server_turn.ROUND - 1 and len(payloads) == 3
    name = next(iter(SHAPES)) + "/A"
    values = [tuple(decode(payload).entries[name].positions.tolist()) for payload in payloads.values()]
    assert len(set(values)) == 3


def test_the_seconds_of_the_parts_make_up_the_whole(monkeypatch):
    monkeypatch.setattr(server_turn, "preset_shapes", lambda preset, layers: SHAPES)
    monkeypatch.setattr(server_turn, "peaks", lambda job, turns: [2 * 4 * turns[0][0].adapter.numel(), None])
    result = server_turn.run("tinyllama", ["fedsrd-e"], clients=(2, 1), rank=2, repeats=1)
    few, many = result["rows"]
    assert (few["clients"], many["clients"], few["peak_adapters"], many["peak_adapters"]) == (1, 2, 2.0, None)
    parts = ("kernel_cpu_s", "decode_s", "encode_s", "choose_s", "average_s", "other_s")
    for row in (few, many):
        assert sum(row[part] for part in parts) == pytest.approx(row["cpu_s"])
        assert all(row[part] > 0 for part in parts) and row["floor_s"] > 0
        assert row["wall_s"] > 0 and row["busy"] > 0
    assert few["ratio"] == 1.0 and many["ratio"] == pytest.approx(many["cpu_s"] / few["cpu_s"])
    assert len(list(server_turn.tables(result))) == 1


def test_the_clocks_are_taken_off_again():
    before = server_turn.wire.decode
    with server_turn.clocks() as spent:
        assert server_turn.wire.decode is not before
    assert server_turn.wire.decode is before and set(spent) == set(server_turn.PARTS)


def test_nothing_to_measure_is_said():
    with pytest.raises(ConfigError, match="nothing to measure"):
        server_turn.run(clients=())
