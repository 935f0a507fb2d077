"""Cards in folders: the code in one loads the adapter, and every folder that fedloom writes has one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from fedloom.adapters.merge.combine import Recipe
from fedloom.adapters.merge.folders import open_folders
from fedloom.adapters.merge.save import save_merge
from fedloom.adapters.settings import AdapterSettings, save_adapter
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.records.configfile import parse
from fedloom.records.ledger import read_rows
from fedloom.report.numbers import summarise
from fedloom.workspace.cards import tell_seeds
from tiny_models import llama, tokenizer
from toy import initial
from toy_run import simulation, toy_setup

MODULES = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]


def adapter(folder: Path, base: str, seed: int) -> Path:
    torch.manual_seed(seed)
    state = LoraState({module: LoraPair(torch.randn(2, 32), torch.randn(32, 2)) for module in MODULES})
    save_adapter(state, base, AdapterSettings(2, 4, ["q_proj"]), folder)
    return folder


def test_the_code_of_a_merges_card_loads_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = tmp_path / "secret" / "base"
    model = llama()
    model.save_pretrained(base)
    inputs = open_folders([adapter(tmp_path / f"clinic-{n}", str(base), n) for n in (1, 2)], [3.0, 1.0])
    save_merge(inputs, Recipe("fedit"), None, tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "merge" in ModelCard(text).data.tags and "| adapter 1 | 0.75 | 2 | 2 |" in text
    assert "clinic" not in text and "secret" not in text and "no ε is claimed" in text
    tokenizer().save_pretrained(tmp_path / "merged")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace('"folder/of/the/base/model", "this/folder"', f"{str(base)!r}, {str(tmp_path / 'merged')!r}")
    held: dict = {}
    exec(code, held)
    assert held["model"].peft_config["default"].r in (2, 4)
    assert len(capsys.readouterr().out) > len("Your prompt")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert not torch.allclose(held["model"](ids).logits, llama()(ids).logits), "the adapter is in the model"


def test_runs_of_several_seeds_tell_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedloom.workspace.export.write_report", lambda folder, rows: summarise(rows))
    folders = [tmp_path / f"seed-{seed}" for seed in (1, 2)]
    for seed, folder in enumerate(folders, start=1):
        settings = {
            "model": {"path": "toy"},
            "federation": {"num_rounds": 2, "seed": seed},
            "training": {"max_steps": 1},
            "output": {"save_every": 1},
        }
        with simulation(toy_setup(parse(settings, ""), 3, initial()), folder) as rounds:
            rounds.play(resume=False)
    first = (folders[0] / "adapters" / "round-00001" / "README.md").read_text(encoding="utf-8")
    last = (folders[0] / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| rounds | 2; this is the model after round 1 |" in first and "| rounds | 2 |" in last
    assert "client-" not in first + last and "| site 3 |" in last
    tell_seeds(folders, [summarise(read_rows(folder / "ledger.jsonl")) for folder in folders])
    again = (folders[0] / "adapter" / "README.md").read_text(encoding="utf-8")
    assert again == last, "toy runs have no scores, and all else is told from the folder as it was from the run"
