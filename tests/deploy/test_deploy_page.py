"""docs/deploy.md is followed word for word: what is marked as tested there is run here."""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fedloom.cli.main import app

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
    assert {first for first, _ in called} >= {"federation", "worker", "run", "status", "inspect"}
    for first, second in called:
        assert first in known and (first != "federation" or second in known[first].commands), (first, second)


@pytest.mark.slow
def test_the_whole_page_on_one_machine(folder):
    done = followed(folder, commands("setup") + "\n" + commands("run"), 900)
    assert "round 3/3" in done.stdout and "finished" in done.stdout, done.stdout + done.stderr
    assert (folder / "runs" / "first" / "adapter" / "adapter_model.safetensors").is_file()
    assert "3 lines, unbroken" in done.stdout
