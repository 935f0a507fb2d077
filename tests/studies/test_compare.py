"""The processes that `compare` plays its runs in."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedloom.cli import main as cli
from fedloom.cli import studies as commands
from fedloom.errors import ConfigError, RoundError
from fedloom.records.config import Config
from fedloom.records.configfile import dump, load_config, parse
from fedloom.report.scores import NO_SCORE
from fedloom.studies import compare
from fedloom.studies.preflight import check_trials
from small_testbed import small_testbed

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
    run = compare.Trial("fedit", 0, Config(), tmp_path / "run")
    monkeypatch.setattr(compare, "_play", die)
    with pytest.raises(RoundError, match="ended from outside.*the same command again"):
        compare.play_runs([run], 1, lambda run, seconds: None)


def test_after_a_run_that_fails_those_that_wait_are_not_begun(monkeypatch, tmp_path):
    made = [compare.Trial("fedit", seed, Config(), tmp_path / str(seed)) for seed in range(20)]
    monkeypatch.setattr(compare, "_play", fail_at_first)
    with pytest.raises(ConfigError, match="seed 0"):
        compare.play_runs(made, 1, lambda run, seconds: None)
    assert not (tmp_path / "19").exists()


def test_what_cannot_be_played_is_refused_before_anything_is(small_demo, tmp_path):
    """A misspelt method, a wrong setting, modules that there are not, a budget that does nothing, an unknown metric."""
    others = ["lora.target_modules=['nothing']", "wire.budget=1%", "evaluation.metrics=['bleu']"]
    variants = ["fedit", "fedsdr", "florist:tau=x", *(f"fedit:{setting}" for setting in others)]
    made = compare.plan_runs(small_demo, variants, [0, 1], tmp_path)
    with pytest.raises(ConfigError) as told:
        check_trials(made)
    first, *lines = str(told.value).splitlines()
    assert first == "5 of 6 variants cannot be played, so none was begun:"
    expected = ["fedsrd", "tau", "nothing", "wire.budget", "chrf, rouge_l, token_f1"]
    assert [word in line for word, line in zip(expected, lines, strict=True)] == [True] * 5
    check_trials([run for run in made if run.label == "fedit"])
    with pytest.raises(ConfigError, match=r"\A[^\n]*fedsdr[^\n]*\Z"):
        check_trials([run for run in made if run.label == "fedsdr"])


def test_without_a_held_out_set_it_is_said_first_and_tables_show_training_loss(small_demo, tmp_path, monkeypatch):
    """The whole command; its runs are played in this process."""
    (tmp_path / "free.toml").write_text(dump(small_demo), encoding="utf-8")
    monkeypatch.setattr(compare, "play_runs", lambda made, jobs, finished: compare.play_here(made, finished))
    monkeypatch.setattr(compare, "expected_seconds", lambda made, jobs, alike: 1.0)
    monkeypatch.setattr(commands, "screen", Console(file=io.StringIO(), width=120))
    out = str(tmp_path / "out")
    sets = [part for text in ("data.heldout=null", "federation.num_rounds=1") for part in ("--set", text)]
    command = ["compare", str(tmp_path / "free.toml"), "--methods", "fedit,ffa", "--seeds", "1", "--out", out, *sets]
    assert CliRunner().invoke(cli.app, command, catch_exceptions=False).exit_code == 0
    first, *rest = commands.screen.file.getvalue().splitlines()
    assert first.startswith("note: Nothing is held out (data.heldout is not set), so there is no score.")
    assert any("training loss" in line for line in rest) and any("up / turn" in line for line in rest)
    head, fedit, ffa = (tmp_path / "out" / "compare.csv").read_text().splitlines()
    assert head.split(",")[:3] == ["run", "seeds", "training loss"] and float(fedit.split(",")[2]) > 0
    assert ffa.startswith("ffa,1,") and (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    assert NO_SCORE in (tmp_path / "out" / "fedit" / "seed-0" / "report.html").read_text()


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    return load_config(small_testbed(tmp_path_factory.mktemp("testbed")) / "demo.toml", ["lora.r=2"])


def fail_at_first(run: compare.Trial) -> float:
    run.folder.mkdir()
    if run.seed == 0:
        raise ConfigError("seed 0")
    time.sleep(0.5)
    return 0.5


def die(run: compare.Trial) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def _runs(pid: int) -> bool:
    """Whether the process is there and is no zombie that waits to be collected."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
