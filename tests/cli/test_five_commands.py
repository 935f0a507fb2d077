"""README's way from two JSONL files and a model's folder to a page in the browser: its commands, word by word."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedloom
import tiny_models
from fedloom.cli.main import app

README = Path(__file__).parents[2] / "README.md"


def commands():
    """Those of the section "From two files to a page", without what is said of them."""
    section = README.read_text(encoding="utf-8").partition("## From two files to a page")[2].partition("\n## ")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1]
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder with what a newcomer has."""
    monkeypatch.chdir(tmp_path)
    tiny_models.llama().save_pretrained("model")
    tiny_models.tokenizer().save_pretrained("model")
    for site in ("bank", "lab"):
        asked = [{"role": "user", "content": f"{site} 2 + 2"}, {"role": "assistant", "content": "4"}]
        Path(f"{site}.jsonl").write_text(f"{json.dumps({'messages': asked})}\n" * 8, encoding="utf-8")
    return tmp_path


@pytest.mark.usefixtures("no_picture")
def test_five_commands_lead_from_two_files_to_a_page(newcomer):
    *first, last = commands()
    assert [words[:2] for words in [*first, last]] == [
        ["fedloom", name] for name in ("init", "preview", "estimate", "run", "serve")
    ]
    said = []
    for words in first:
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, f"{shlex.join(words)}: {done.output}"
        said.append(done.output)
    assert "next: fedloom preview my.toml" in said[0]
    assert "examples: bank 8, lab 8" in said[1].replace("\n", " ")
    assert "in runs/my:" in said[3]
    # The last one goes on until Ctrl-C: as a process of its own.
    process = subprocess.Popen(
        [sys.executable, "-m", *last],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(fedloom.__file__).parents[1])},  # this very package
    )
    try:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        with urllib.request.urlopen(address, timeout=20) as answer:
            page = answer.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
    assert "<h1" in page and "finished" in page and "bank" in page
