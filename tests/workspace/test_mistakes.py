"""What a user gets for a mistake of their own, on the real command line: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedloom.cli import main as cli

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a settings file, a model and a little data of its own, to be broken."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TESTBED / "model", tmp_path / "model")
    for client in ("bank", "lab"):
        (tmp_path / "data" / client).mkdir(parents=True)
        for split in ("train", "heldout"):
            lines = (TESTBED / "data" / client / f"{split}.jsonl").read_text().splitlines()[:12]
            (tmp_path / "data" / client / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "demo.toml").write_text((TESTBED / "demo.toml").read_text())
    return tmp_path


def fedloom(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


def run(*sets: str, out: str = "out") -> tuple[int, str]:
    short = ["federation.num_rounds=1", "training.max_steps=1", "federation.eval_every=0"]
    overrides = [part for text in [*short, *sets] for part in ("--set", text)]
    return fedloom("run", "demo.toml", "--out", out, *overrides)


def without_weights(project: Path) -> None:
    (project / "model" / "model.safetensors").unlink()


def without_examples(project: Path) -> None:
    (project / "data" / "lab" / "train.jsonl").write_text("\n")


def with_a_broken_line(project: Path) -> None:
    with (project / "data" / "lab" / "train.jsonl").open("a") as file:
        file.write('{"instruction": "sort", "output"\n')


def with_other_columns(project: Path) -> None:
    (project / "data" / "lab" / "train.jsonl").write_text(json.dumps({"frage": "a", "antwort": "b"}) + "\n")


def with_other_files(project: Path) -> None:
    (project / "out").mkdir()
    (project / "out" / "notes.txt").write_text("mine")


def with_a_file_in_its_place(project: Path) -> None:
    (project / "out").write_text("mine")


def with_an_adapter_of_another_model(project: Path) -> None:
    """The shipped model's adapter, one of whose modules is made wider."""
    import torch
    from safetensors.torch import load_file, save_file

    assert run(out="first")[0] == 0
    path = project / "first" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    tensors[name] = torch.zeros(tensors[name].shape[0], tensors[name].shape[1] + 8)
    save_file(tensors, path)


def nothing(project: Path) -> None:
    """The project is whole; the settings are not."""


@pytest.mark.parametrize(
    ("breaks", "sets", "words"),
    [
        (nothing, ["model.path=./nowhere"], ["no base model at", "nowhere"]),
        (without_weights, [], ["model", "holds no weights", "model.safetensors"]),
        (nothing, ["data.source=./nowhere/{client}"], ["nowhere", "no client"]),
        (without_examples, [], ["lab/train.jsonl", "no examples"]),
        (with_a_broken_line, [], ["lab/train.jsonl", "line 13", "JSON"]),
        (with_other_columns, [], ["lab/train.jsonl", "line 1", "instruction and output"]),
        (nothing, ["training.learnin_rate=0.1"], ["training.learnin_rate", "did you mean", "training.learning_rate"]),
        (nothing, ["training.max_steps=many"], ["training.max_steps", "many", "a whole number"]),
        (nothing, ["lora.r=0"], ["lora.r", "at least 1"]),
        (nothing, ["lora.target_modules=['q_porj']"], ["q_porj", "did you mean", "q_proj"]),
        (nothing, ["method.name=fedsdr"], ["fedsdr", "did you mean", "fedsrd"]),
        (nothing, ["method.ridg=0.1"], ["ridg", "did you mean", "ridge"]),
        (nothing, ["method.ridge=-1"], ["ridge", "-1"]),
        (nothing, ["federation.participants=['bnak']"], ["bnak", "bank, lab"]),
        (nothing, ["federation.num_clients=3"], ["num_clients is 3", "2"]),
        (nothing, ["method.name=fed-sb", "clients.lab.target_modules=['q_proj']"], ["fed-sb", "same modules", "lab"]),
        (nothing, ["data.template=alpcaa"], ["alpcaa", "alpaca"]),
        (nothing, ["data.max_length=8"], ["max_length", "8"]),
        (nothing, ["model.quantization=5bit"], ["5bit", "'4bit'"]),
        (with_other_files, [], ["out", "holds other files", "--out"]),
        (with_a_file_in_its_place, [], ["out", "is a file", "--out"]),
        (with_an_adapter_of_another_model, ["model.adapter=./first/adapter"], ["q_proj", "another base model"]),
        (nothing, ["model.adapter=./nowhere"], ["nowhere", "PEFT adapter folder"]),
    ],
)
def test_a_mistake_is_one_line(project: Path, breaks: Callable[[Path], None], sets: list[str], words: list[str]):
    breaks(project)
    code, message = run(*sets)
    assert code == 2
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert "Traceback" not in message
    for word in words:
        assert word in message, message


def test_missing_settings_and_broken_resumes_are_one_line_too(project: Path):
    assert fedloom("run", "nowhere.toml")[1].startswith("error: nowhere.toml: no such file")
    code, message = fedloom("run", "demo.toml", "--out", "never-begun", "--resume")
    assert code == 2 and "holds no run to resume" in message
    assert run()[0] == 0
    code, message = run()
    assert code == 2 and "another run" in message and "--resume" in message
    data = project / "data" / "lab" / "train.jsonl"
    whole = data.read_text()
    data.write_text(whole.partition("\n")[2])
    code, message = fedloom("run", "out/config.toml", "--out", "out", "--resume")
    assert code == 2 and "other data" in message and "resume with those" in message
    data.write_text(whole)
    newest = sorted((project / "out" / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    code, message = fedloom("run", "out/config.toml", "--out", "out", "--resume")
    assert code == 2 and newest.name in message and "delete it" in message


def test_going_on_from_an_adapter_starts_where_it_ended(project: Path):
    assert run(out="first")[0] == 0
    from fedloom.lora.pair import digest
    from fedloom.model.peft_bridge import read_adapter, write_adapter
    from fedloom.records.configfile import load_config
    from fedloom.workspace.assemble import load_setup

    setup = load_setup(load_config(project / "demo.toml", ["model.adapter=./first/adapter"]))
    from fedloom.adapters.folder import load_adapter

    assert digest(setup.initial) == digest(load_adapter(project / "first" / "adapter")[0])
    write_adapter(setup.model, setup.initial)
    assert digest(read_adapter(setup.model)) == digest(setup.initial)


def test_every_device_that_the_settings_file_names_is_known():
    """A device that is not here may be refused, but for that reason."""
    from fedloom.errors import ConfigError, ModelError
    from fedloom.model.base import load_base
    from fedloom.records.config import ModelSettings

    named = re.findall(r'"([^"]+)"', ModelSettings.model_fields["device"].description or "")
    assert named == ["auto", "cpu", "cuda"]
    for device in named:
        with pytest.raises((ModelError, ConfigError), match="no base model at|finds no GPU here"):
            load_base("./nowhere", device=device)
