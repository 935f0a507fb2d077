"""A hundred thousand rounds with one client that means harm: minutes, so only with `make check-slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedloom.methods.table import METHODS

SCRIPT = Path(__file__).parent / "fuzz_rounds.py"


def fuzzed(count):
    done = subprocess.run([sys.executable, SCRIPT, "--count", str(count)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_three_hundred_rounds_with_a_liar():
    result = fuzzed(300)
    assert result["refused"] + result["averaged"] + result.get("failed", 0) == 300
    assert result["refused"] > 100 and result["averaged"] > 30
    assert result["methods"] == len(METHODS)


@pytest.mark.slow
def test_a_hundred_thousand_rounds_with_a_liar():
    result = fuzzed(100_000)
    print(json.dumps(result))
    assert result["refused"] + result["averaged"] + result["failed"] == 100_000
