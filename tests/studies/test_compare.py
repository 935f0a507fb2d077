"""The processes that `compare` plays its runs in."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from fedloom.errors import ConfigError, RoundError
from fedloom.records.config import Config
from fedloom.records.configfile import parse
from fedloom.studies import compare

PARENT = textwrap.dedent(
    """
    import os, sys, time
    from fedloom.studies import compare

    if __name__ == "__main__":
        pool = compare._pool(1)
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600)
        time.sleep(600)
    """
)


def test_no_worker_outlives_a_comparison_that_was_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        worker = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(30)
        deadline = time.monotonic() + 30
        while _runs(worker) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _runs(worker)
    finally:
        parent.kill()
        parent.stdout.close()


def test_a_variant_sets_the_method_s_keys_other_tables_keys_and_whole_tables(tmp_path):
    config = parse({"clients": {"ada": {"r": 2}}}, "here")
    (run,) = compare.plan_runs(config, ["florist:tau=0.9,lora.r=4,clients=null"], [7], tmp_path)
    made = run.config
    assert (made.method.settings, made.lora.r, made.federation.seed) == ({"tau": 0.9}, 4, 7)
    assert config.clients and not made.clients


def test_a_worker_that_is_killed_is_told_in_words(monkeypatch, tmp_path):
    run = compare.Run("fedit", 0, Config(), tmp_path / "run")
    monkeypatch.setattr(compare, "_play", die)
    with pytest.raises(RoundError, match="ended from outside.*the same command again"):
        compare.play_runs([run], 1, lambda run, seconds: None)


def test_after_a_run_that_fails_those_that_wait_are_not_begun(monkeypatch, tmp_path):
    made = [compare.Run("fedit", seed, Config(), tmp_path / str(seed)) for seed in range(20)]
    monkeypatch.setattr(compare, "_play", fail_at_first)
    with pytest.raises(ConfigError, match="seed 0"):
        compare.play_runs(made, 1, lambda run, seconds: None)
    assert not (tmp_path / "19").exists()


def fail_at_first(run: compare.Run) -> float:
    run.folder.mkdir()
    if run.seed == 0:
        raise ConfigError("seed 0")
    time.sleep(0.5)
    return 0.5


def die(run: compare.Run) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def _runs(pid: int) -> bool:
    """Whether the process is there and is no zombie that waits to be collected."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
