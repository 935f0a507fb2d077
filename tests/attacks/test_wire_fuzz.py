"""A million mutated payloads, each a message or a WireError: minutes, so only with `make check-slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "fuzz_wire.py"


def fuzzed(count):
    done = subprocess.run([sys.executable, SCRIPT, "--count", str(count)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_thousand_fuzzed_payloads():
    result = fuzzed(1000)
    assert result["refused"] + result["read"] == 1000
    assert result["read"] > 0


@pytest.mark.slow
def test_a_million_fuzzed_payloads():
    result = fuzzed(1_000_000)
    assert result["refused"] + result["read"] == 1_000_000
