"""The model card of an adapter: the Hub can read it, and it tells strangers numbers, never names."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from fedloom.records.config import Config
from fedloom.records.configfile import parse
from fedloom.records.ledger import Choice, Evaluation, Row, RunRow, Training, Transfer
from fedloom.report.card import CardFacts, hub_name, model_card
from fedloom.report.numbers import summarise

CLIENTS = ("northern-clinic", "st-mary")
FACTS = CardFacts(rank=16, examples=(1200, 80), digest="ab" * 16)


def rows(method: str = "fedsrd") -> list[Row]:
    scores = [Evaluation(at, name, 0.5, 2.0 - at / 4) for at in (0, 4) for name in CLIENTS]
    turns = [Training(1, name, 1.0, 5, 80) for name in CLIENTS]
    sent = [Transfer(1, name, "up", "update", 2048) for name in CLIENTS]
    return [RunRow(method, "/home/me/secret/model", CLIENTS, 9, 100, 7), *scores, *turns, *sent, Choice(4, 3)]


def config(path: str, **training: object) -> Config:
    federation = {"early_stopping_patience": 2, "participants": list(CLIENTS)}
    data = {"heldout": "heldout", "validation": "validation"}
    return parse({"model": {"path": path}, "federation": federation, "data": data, "training": training}, "test")


def test_the_hub_reads_the_header_and_people_the_rest():
    card = model_card(summarise(rows()), config("some/base", num_train_epochs=2.0), FACTS)
    data = ModelCard(card).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("some/base", "peft", "text-generation")
    assert data.tags[0] == "base_model:adapter:some/base" and "federated-learning" in data.tags
    for told in (
        "| rounds | 4; this is the model after round 3 |",
        "| method | `fedsrd` |",
        "2 epochs a client",
        "| examples | 1,280 in all, 80 to 1,200 a client |",
        "4.0 KiB up",
        "mean over 2 sets",
        "a validation split",
        "| loss | 2.000 | 1.000 |",
        "digest `abababab`",
    ):
        assert told in card, told


def test_a_card_names_no_client_and_no_folder():
    card = model_card(summarise(rows()), config("/home/me/secret/model"), FACTS)
    assert not any(name in card for name in (*CLIENTS, "/home/me", "secret"))
    assert ModelCard(card).data.base_model is None and "LoRA adapter on `model`" in card


@pytest.mark.parametrize("name", ["a`b|c\n---\nbase_model: evil/model", "x\x1b[31m", "<script>`"])
def test_a_name_of_others_stays_in_its_cell(name: str):
    card = model_card(summarise(rows(name)), config(name), FACTS)
    assert ModelCard(card).data.base_model is None
    assert "\x1b" not in card and card.count("\n---\n") == 1
    line = next(line for line in card.splitlines() if line.startswith("| method"))
    assert line.count("`") == 2 and line.count("|") == 3


def test_the_hubs_name_of_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    cached = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B/snapshots/060db64"
    assert [hub_name(path) for path in (cached, "Qwen/Qwen2.5-0.5B", "./model")] == ["Qwen/Qwen2.5-0.5B"] * 2 + [None]
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub_name("owner/name") is None, "it is a folder here"


def test_who_chooses_on_the_heldout_split_is_told_so():
    leaky = config("some/base").model_copy(
        update={"data": config("b").data.model_copy(update={"validation": "heldout"})}
    )
    assert "the numbers are too good" in model_card(summarise(rows()), leaky, FACTS)
