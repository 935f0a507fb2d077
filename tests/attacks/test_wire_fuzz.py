"""Mutated payloads, each a message or a WireError: some thousands always, a million with `make check-slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "fuzz_wire.py"
MOST_GROWTH = 256  # MiB of what one process holds beyond its start, whatever it was given to read


def fuzz(count, seed):
    """The figures of a process of its own, under a limit of memory; it ends with an error at an input that fails."""
    command = [sys.executable, SCRIPT, "--count", str(count), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check_figures(figures, count):
    assert figures["refused"] + figures["accepted"] == count == sum(made for made, _ in figures["kinds"].values())
    assert min(made for made, _ in figures["kinds"].values()) > count / 30
    assert figures["accepted"] > count / 20
    assert figures["growth_mib"] < MOST_GROWTH


def test_five_thousand_fuzzed_payloads():
    check_figures(fuzz(5000, seed=1), 5000)


@pytest.mark.slow
def test_a_million_fuzzed_payloads(capsys):
    figures = fuzz(1_000_000, seed=0)
    with capsys.disabled():
        print(f"\n{json.dumps(figures)}")
    check_figures(figures, 1_000_000)
