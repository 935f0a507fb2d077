"""`python -m benchmarks wire`: its rows hold what the issue asks for, from synthetic and from recorded updates."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from benchmarks import wire as bench
from fedloom.compress.entries import Dense, Seeded, Sparse, to_dense
from fedloom.compress.masks import seeded_count
from fedloom.errors import ConfigError
from fedloom.studies.estimate.paper import paper_decode, paper_encode
from fedloom.wire import Header, Message, encode
from wire_samples import equal_entries

KEYS = [
    "values",
    "up_bytes",
    "down_bytes",
    "total_bytes",
    "position_bits",
    "entropy_bits",
    "encode_s",
    "decode_s",
    "error",
]


@pytest.fixture(scope="module")
def result():
    return bench.run("tinyllama", layers=1, rank=4, repeats=1)


def test_rows_and_keys(result):
    assert [row["values"] for row in result["rows"]] == ["paper", "fp32", "bf16", "int8", "int4"]
    assert all(list(row) == KEYS for row in result["rows"])
    assert all(row["total_bytes"] == row["up_bytes"] + row["down_bytes"] for row in result["rows"])
    json.dumps(result, allow_nan=False)


def test_forms_trade_bytes_for_error(result):
    rows = result["rows"]
    assert [row["total_bytes"] for row in rows] == sorted((row["total_bytes"] for row in rows), reverse=True)
    assert rows[0]["error"] == rows[1]["error"] == 0.0
    errors = [row["error"] for row in rows[1:]]
    assert errors == sorted(errors) and 0 < errors[1] < 0.01 < errors[3] < 0.5


def test_bits_of_positions(result):
    for row in result["rows"][1:]:
        assert row["entropy_bits"] == pytest.approx(5.73, abs=0.02)
        assert row["position_bits"] < 1.03 * row["entropy_bits"]
    assert result["rows"][0]["position_bits"] == pytest.approx(20, abs=0.1)


def test_structure_makes_positions_cheaper():
    rows = bench.run("tinyllama", layers=1, rank=8, structured=True, repeats=1)["rows"]
    assert rows[1]["position_bits"] < 0.95 * rows[1]["entropy_bits"]


def test_the_paper_format_is_encoded_in_full():
    sparse = Sparse((3, 5), torch.tensor([0, 7, 14]), torch.tensor([1.0, -2.0, 3.5]))
    payload = paper_encode({"m/A": sparse})
    assert len(payload) == 2 + 12
    assert equal_entries(paper_decode(payload, {"m/A": (3, 5)})["m/A"], sparse)
    assert len(paper_encode({"m/A": Dense((2, 4), torch.zeros(8))})) == 1 + 32
    masked = Seeded((4, 8), 3, 0.5, torch.ones(seeded_count(32, 0.5, 3)))
    read = paper_decode(paper_encode({"m/A": masked}), {"m/A": (4, 8)})
    assert torch.equal(to_dense(read["m/A"]), to_dense(masked))


def test_the_error_is_that_of_the_product():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(3, 20, generator=generator), torch.randn(30, 3, generator=generator)
    exact = {"m/A": Dense((3, 20), a.flatten()), "m/B": Dense((30, 3), b.flatten())}
    near = {"m/A": Dense((3, 20), (a * 1.01).flatten()), "m/B": Dense((30, 3), (b + 0.1).flatten())}
    expected = (((b + 0.1) @ (a * 1.01) - b @ a).norm() / (b @ a).norm()).item()
    assert bench.product_error(exact, near) == pytest.approx(expected, rel=1e-4)


def test_recorded_payloads(tmp_path):
    update = Sparse((4, 50), torch.arange(0, 200, 10), torch.linspace(-1, 1, 20))
    change = Sparse((50, 4), torch.arange(0, 200, 20), torch.linspace(-1, 1, 10))
    for number, kind in enumerate(("update", "change", "update")):
        entries = {"m/A": update, "m/B": change}
        payload = encode(Message(Header(kind, "fedsrd", 1, 0, ""), entries))
        (tmp_path / f"{number}.fedloom").write_bytes(payload)
    result = bench.run(recorded=tmp_path, repeats=1)
    assert result["workload"]["parameters"] == 800
    assert result["workload"]["sent"] == 60
    assert math.isfinite(result["rows"][4]["error"]) and result["rows"][4]["error"] > 0


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(ConfigError, match="no payload of an update"):
        bench.run(recorded=tmp_path)


def test_the_table_shows_every_row(result):
    out = io.StringIO()
    for table in bench.tables(result):
        Console(width=160, file=out).print(table)
    shown = out.getvalue()
    assert all(row["values"] in shown for row in result["rows"])
