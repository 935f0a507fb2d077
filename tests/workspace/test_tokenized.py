"""A run is set up with its examples rendered, packed and held to its model, and says what there is to know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedloom.errors import ConfigError, ModelError
from fedloom.model.limits import ModelLimits
from fedloom.records.configfile import load_config
from fedloom.workspace import assemble
from fedloom.workspace.assemble import load_setup
from small_testbed import small_testbed


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_testbed(tmp_path_factory.mktemp("bed"))
    talk = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]
    for client in ("bank", "lab"):
        (folder / "talks" / client).mkdir(parents=True)
        (folder / "talks" / client / "train.jsonl").write_text(json.dumps({"messages": talk}))
    return folder


def test_training_is_packed_and_scoring_is_not(bed: Path) -> None:
    setup = load_setup(load_config(bed / "demo.toml", ["data.packing=true"]))
    for site in setup.sites.values():
        assert 0 < site.data.num_rows < len(site.data) == 6
    assert all(not data.rows for data in setup.heldout.values())
    assert setup.warnings() == ["examples: bank 6, clinic 6, depot 6, lab 6"]


def test_packing_is_tried_on_the_model(bed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: object, vocabulary: int) -> None:
        raise ConfigError(f"leaks among {vocabulary}")

    monkeypatch.setattr(assemble, "check_packs", refuse)
    load_setup(load_config(bed / "demo.toml", []))
    with pytest.raises(ConfigError, match="leaks among 640"):
        load_setup(load_config(bed / "demo.toml", ["data.packing=true"]))


def test_what_conversations_took_is_said_once(bed: Path) -> None:
    sets = [f"data.source={bed}/talks/{{client}}", "data.heldout=null", "data.validation=null", "data.template=auto"]
    notes = load_setup(load_config(bed / "demo.toml", sets)).warnings()
    assert len([note for note in notes if "own chat template" in note]) == 1


def test_a_model_that_cannot_read_the_tokens_is_refused_before_training(
    bed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "model_limits", lambda base: ModelLimits(40, None, False))
    with pytest.raises(ModelError, match="client 'bank': the tokenizer gives token .* 40 rows"):
        load_setup(load_config(bed / "demo.toml", []))
