"""docs/deploy.md is followed word for word: what is marked as tested there is run here."""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.records.ledger import Evaluation, Presence, Roll, RunRow, Training, Transfer
from fedloom.records.session import Session
from fedloom.report.metrics import prometheus_text

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def commands(mark):
    """The shell blocks of the page under this mark, in order."""
    return "\n".join(re.findall(rf"<!-- tested: {mark} -->\n```sh\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def folder(tmp_path):
    """A folder that looks like the repository's, with this interpreter's programs first on the path."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "fedloom").write_text(f'#!/bin/sh\nexec {sys.executable} -m fedloom "$@"\n')
    (programs / "fedloom").chmod(0o755)
    return tmp_path


def followed(folder, script, seconds):
    path = os.pathsep.join([str(folder / "programs"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = ["timeout", "--signal=INT", str(seconds), "bash", "-e", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_setting_up_and_the_doctor_as_the_page_says(folder, monkeypatch):
    """Within this process, which has torch loaded already; the slow test below has the shell do it."""
    monkeypatch.chdir(folder)
    script = f"{commands('setup')}\n{commands('two')}".replace("\\\n", " ").replace("$PWD", str(folder))
    lines = [line for line in script.splitlines() if line]
    assert len(lines) == 8
    said = ""
    for line in lines:
        program, *arguments = shlex.split(line)
        done = CliRunner().invoke(app, arguments)
        assert (program, done.exit_code) == ("fedloom", 0), f"{line}: {done.output}"
        said += done.stdout
    assert "fail" not in said and said.count("1800 examples") == 5
    for site in ("bank", "clinic", "lab"):
        assert stat.S_IMODE((folder / "fed" / "sites" / site / "node.key").stat().st_mode) == 0o600


def test_every_fedloom_command_of_the_page_exists():
    known = get_command(app).commands
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    inline = re.findall(r"`(fedloom [^`]+)`", PAGE.replace("```", ""))
    called = re.findall(r"\bfedloom ([a-z]+) ?([a-z]*)", "\n".join([*blocks, *inline]))
    assert {first for first, _ in called} >= {"federation", "worker", "run", "status", "stop", "inspect"}
    for first, second in called:
        assert first in known and (first != "federation" or second in known[first].commands), (first, second)


def test_the_alert_rules_are_yaml_and_name_metrics_that_a_run_has():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in rules} >= {"FedloomRunDead", "FedloomSiteMissing", "FedloomCertificateEnds"}
    began = Session(0, "2026-11-01T00:00:00+00:00", "", certificates={"server": "2027-11-01T00:00:00+00:00"})
    rows = [
        RunRow(method="fedsrd", model="m", clients=("ada",), num_rounds=2, adapter_values=9, seed=0),
        began,
        Presence(1, ("ada",)),
        Transfer(1, "ada", "up", "update", 3),
        Training(1, "ada", 0.5, 1, 1),
        Evaluation(1, "x", 0.5, 1.0, tokens=3, bytes=9, metrics={"chrf": 0.5}),
        Roll(1, ("ada",)),
    ]
    written = prometheus_text(rows, "first", 1e9)
    known = set(re.findall(r"^# TYPE (\S+)", written, re.MULTILINE))
    assert known == set(re.findall(r"`(fedloom_\w+)`", PAGE)), "the table of the page has every metric"
    for rule in rules:
        labels = rule["annotations"]["summary"]
        for metric in set(re.findall(r"fedloom_\w+", rule["expr"])):
            line = next(line for line in written.splitlines() if line.startswith(f"{metric}{{"))
            assert metric in known and (
                "on (run)" in rule["expr"]
                or all(f'{name}="' in line for name in re.findall(r"\$labels\.(\w+)", labels))
            ), (metric, labels)


@pytest.mark.slow
def test_the_whole_page_on_one_machine(folder):
    done = followed(folder, commands("setup") + "\n" + commands("run"), 900)
    assert "round 3/3" in done.stdout and "finished" in done.stdout, done.stdout + done.stderr
    assert (folder / "runs" / "first" / "adapter" / "adapter_model.safetensors").is_file()
    assert "3 lines, unbroken" in done.stdout
