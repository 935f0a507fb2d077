"""An adapter knows the weights that it was trained on, and is not used with others unless that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_peft_bridge import random_state
from typer.testing import CliRunner

import fedloom
from fedloom.adapters.base_identity import digest_weights
from fedloom.adapters.folder import AdapterFolder
from fedloom.adapters.settings import WEIGHTS_FILE, save_adapter
from fedloom.cli import main as cli
from fedloom.errors import ModelError
from fedloom.records.configfile import parse
from fedloom.workspace.plan import first_adapter
from tiny_models import llama, placed


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Two base models of the same shapes; the first once more in many files, and once changed in its last layer."""
    folder = tmp_path_factory.mktemp("bases")
    for name, seed, shard in (("a", 0, "50GB"), ("sharded", 0, "50KB"), ("b", 1, "50GB")):
        llama(seed).save_pretrained(folder / name, max_shard_size=shard)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tmp_path_factory) -> dict[str, Path]:
    """An adapter of fedloom's on each base, and one without a digest, as other tools write it."""
    adapter, made = placed(llama(), r=2, lora_alpha=4), {}
    for name, base in {**bases, "foreign": bases["a"]}.items():
        made[name] = tmp_path_factory.mktemp("adapters") / name
        digest = "" if name == "foreign" else digest_weights(base)
        state = random_state(adapter.shapes, adapter.ranks)
        save_adapter(state, base, adapter.settings, made[name], base_digest=digest)
    return made


def test_the_digest_is_of_tensors_and_not_of_files(bases: dict[str, Path], tmp_path: Path):
    found = {name: digest_weights(path) for name, path in bases.items()}
    assert len(list(bases["sharded"].glob("*.safetensors"))) > 1
    assert found["a"] == found["sharded"] != found["b"] and len(found["a"]) == 32
    tensors = load_file(bases["a"] / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-3
    (tmp_path / "norm").mkdir()
    save_file(tensors, tmp_path / "norm" / "model.safetensors", {"format": "pt"})
    assert digest_weights(tmp_path / "norm") not in found.values()
    assert digest_weights(tmp_path) == ""
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert digest_weights(tmp_path) == ""


def test_peft_reads_past_the_digest(bases: dict[str, Path], adapters: dict[str, Path]):
    assert AdapterFolder(adapters["a"]).base_digest == digest_weights(bases["a"])
    assert AdapterFolder(adapters["foreign"]).base_digest == ""
    model = peft.PeftModel.from_pretrained(llama(), adapters["a"])
    held = peft.get_peft_model_state_dict(model)
    stored = load_file(adapters["a"] / WEIGHTS_FILE)
    assert held.keys() == stored.keys() and all(torch.equal(held[name], stored[name]) for name in stored)


def aggregate(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["aggregate", *map(str, arguments), "--energy", "1"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join((result.stderr + result.stdout).split())


def test_aggregate_refuses_another_base_unless_told(bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path):
    code, told = aggregate(adapters["a"], "--base-model", bases["b"], "--out", tmp_path / "out")
    assert code == 2 and "was trained on other weights than those of --base-model" in told and "--any-base" in told
    assert not (tmp_path / "out").exists()
    assert aggregate(adapters["a"], "--base-model", bases["b"], "--out", tmp_path / "any", "--any-base")[0] == 0
    assert aggregate(adapters["a"], "--base-model", bases["sharded"], "--out", tmp_path / "same")[0] == 0
    code, told = aggregate(adapters["foreign"], "--base-model", bases["b"], "--out", tmp_path / "foreign")
    assert code == 0 and "note: the adapter was trained on" in told  # only its base's name is known


def test_adapters_of_two_bases_are_not_merged(adapters: dict[str, Path], bases: dict[str, Path], tmp_path: Path):
    code, told = aggregate(adapters["a"], adapters["b"], "--out", tmp_path / "out")
    assert code == 2 and "were trained on base models of different weights" in told
    with pytest.raises(ModelError, match="any_base=True"):
        fedloom.merge([adapters["a"], adapters["b"]])
    one = fedloom.merge([adapters["a"], adapters["sharded"]], energy=1).save(tmp_path / "one")
    assert AdapterFolder(one).base_digest == digest_weights(bases["a"])
    mixed = fedloom.merge([adapters["a"], adapters["foreign"]], energy=1).save(tmp_path / "mixed")
    assert AdapterFolder(mixed).base_digest == ""  # nobody knows of the second
    with pytest.raises(ModelError, match="other weights than those of"):
        fedloom.merge([adapters["a"]]).save(tmp_path / "model", base_model=bases["b"])
    with pytest.warns(UserWarning, match="name different base models"):
        both = fedloom.merge([adapters["a"], adapters["b"]], energy=1, any_base=True).save(tmp_path / "both")
    assert AdapterFolder(both).base_digest == ""


@pytest.mark.parametrize("base", ["a", "b"])
def test_a_run_starts_on_an_adapter_of_its_own_base(bases: dict[str, Path], adapters: dict[str, Path], base: str):
    adapter = placed(llama(), r=2, lora_alpha=4)
    model = {"path": str(bases["a"]), "adapter": str(adapters[base])}
    start = lambda **more: first_adapter(parse({"model": {**model, **more}}, "test"), adapter.shapes, adapter.ranks)  # noqa: E731
    if base == "b":
        with pytest.raises(ModelError, match=r"give the base model that it names, .*/b; model.any_base = true goes on"):
            start()
    assert set(start(any_base=base == "b")) == set(adapter.ranks)


def test_what_a_stranger_wrote_there_is_no_digest(adapters: dict[str, Path], tmp_path: Path):
    for file in adapters["a"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    for text in ("x" * 10**5, "\x1b[31m", json.dumps(["a"])):
        save_file(tensors, tmp_path / WEIGHTS_FILE, {"format": "pt", "fedloom_base": text})
        assert AdapterFolder(tmp_path).base_digest == ""
