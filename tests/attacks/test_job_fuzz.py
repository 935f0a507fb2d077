"""Mutated jobs at a desk, in a process of their own: ten thousand take minutes, so only with `make check-slow`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fuzz_jobs.py"


def fuzzed(count):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, SCRIPT, "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def holds(result, count):
    answers = [result.get(ask, 0) for ask in ("refused", "hello", "turn", "deliver")]
    assert sum(answers) == count and result["refused"] > count / 2 and sum(answers[1:]) > 0
    assert result["moved"] == 0 and result["peak_mib"] < 2048


def test_some_mutated_jobs():
    holds(fuzzed(150), 150)


@pytest.mark.slow
def test_ten_thousand_mutated_jobs(capsys):
    result = fuzzed(10_000)
    with capsys.disabled():
        print(f"\n{json.dumps(result)}")
    holds(result, 10_000)
    assert result["turn"] > 50
