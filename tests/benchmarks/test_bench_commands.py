"""`python -m benchmarks`: tables or JSON, and one line for a mistake."""

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import commands
from fedloom.cli import funnel


@pytest.fixture
def call(monkeypatch):
    """Run the measurements' command line in-process; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        complaints = io.StringIO()
        monkeypatch.setattr(funnel, "complaints", Console(file=complaints, width=200))
        result = CliRunner().invoke(commands.app, list(map(str, arguments)))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, complaints.getvalue() + result.stderr

    return call


def test_the_kernel_bench_prints_tables_or_json(call):
    options = ("aggregate", "--preset", "tinyllama", "--modules", "k_proj", "--ranks", "4,4", "--repeats", 1)
    code, out, _ = call(*options, "--methods", "fedit", "--json")
    assert code == 0
    result = json.loads(out, parse_constant=pytest.fail)
    assert [row["method"] for row in result["rows"]] == ["fedit"]
    assert {"machine"} <= set(result)
    code, out, _ = call(*options, "--methods", "fedit")
    assert code == 0
    assert "fedit" in out


def test_the_wire_bench_prints_json(call):
    options = ("wire", "--preset", "tinyllama", "--layers", 1, "--rank", 2, "--repeats", 1)
    code, out, _ = call(*options, "--json")
    assert code == 0
    rows = json.loads(out, parse_constant=pytest.fail)["rows"]
    assert {"fp32", "bf16", "int8", "int4", "paper"} == {row["values"] for row in rows}


def test_the_wire_bench_says_what_a_folder_lacks(call, tmp_path):
    code, _, err = call("wire", "--recorded", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "no payload of an update" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "gpt-9"), "preset 'gpt-9' is unknown; known: "),
        (("--ranks", "4,x"), "--ranks 4,x: expected whole numbers"),
        (("--methods", "magic"), "method 'magic' has no kernel"),
        (("--modules", "q"), "llama-3.2-3b has no module 'q'"),
    ],
)
def test_mistakes_in_a_bench(call, options, message):
    code, _, err = call("aggregate", *options)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
