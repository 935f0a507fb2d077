"""The model card of an adapter: the Hub can read it, and it tells strangers numbers, never names."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from fedloom.records.config import Config
from fedloom.records.configfile import parse
from fedloom.records.ledger import Choice, Evaluation, Row, RunRow, Training, Transfer
from fedloom.report.card import MOST_SITES, CardFacts, hub_name, model_card
from fedloom.report.card_header import LICENSES, write_header
from fedloom.report.numbers import summarise
from fedloom.report.progress import Progress

CLIENTS = ("northern-clinic", "st-mary")
EXAMPLES = {"northern-clinic": 80, "st-mary": 1200}


def rows(method: str = "fedsrd", seed: int = 7, gain: float = 0.25) -> list[Row]:
    scores = [Evaluation(at, name, 0.5, 2.0 - at * gain) for at in (0, 4) for name in CLIENTS]
    turns = [Training(1, name, 1.0, 5, EXAMPLES[name]) for name in CLIENTS]
    sent = [Transfer(1, name, "up", "update", 2048) for name in CLIENTS]
    return [RunRow(method, "/home/me/secret/model", CLIENTS, 9, 100, seed), *scores, *turns, *sent, Choice(4, 3)]


def config(path: str, **tables: dict[str, object]) -> Config:
    federation = {"early_stopping_patience": 2, "participants": list(CLIENTS)}
    data = {"heldout": "heldout", "validation": "validation"}
    training = {"max_steps": 3, **tables.pop("training", {})}
    return parse({"model": {"path": path}, "federation": federation, "data": data, "training": training, **tables}, "")


def facts(method: str = "fedsrd", **more: object) -> CardFacts:
    return CardFacts(16, "ab" * 16, 3, Progress.of(rows(method)), EXAMPLES, **more)


def test_the_hub_reads_the_header_and_people_the_rest():
    epochs = {"num_train_epochs": 2.0, "max_steps": None}
    card = model_card(config("some/base", training=epochs, method={"name": "fedsrd", "step_guard": False}), facts())
    data = ModelCard(card).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("some/base", "peft", "text-generation")
    assert data.tags[0] == "base_model:adapter:some/base" and "federated-learning" in data.tags
    for told in (
        "| rounds | 4; this is the model after round 3 |",
        "| method | `fedsrd` with `step_guard = False` |",
        "2 epochs a client",
        "| examples | 1,280 in all, 80 to 1,200 a client |",
        "4.0 KiB up",
        "mean over 2 sets",
        "a validation split",
        "| loss (nats a token) | 2.000 | 1.000 |",
        f"digest `{'ab' * 16}`",
        "No differential privacy is claimed",
    ):
        assert told in card, told


def test_a_card_names_no_client_and_no_folder():
    card = model_card(config("/home/me/secret/model"), facts())
    assert not any(name in card for name in (*CLIENTS, "/home/me", "secret"))
    assert ModelCard(card).data.base_model is None and "LoRA adapter on `model`" in card


def test_sites_are_numbered_by_their_examples_or_named_if_asked():
    card = model_card(config("b"), facts())
    assert "| site 1 | 1200 | 1 | 0 | 2.0 KiB | 0 B |\n| site 2 | 80 | 1 | 0 | 2.0 KiB | 0 B |" in card
    named = model_card(config("b", output={"name_sites": True}), facts())
    assert "| `st-mary` | 1200 |" in named and "site 1" not in named
    many = Progress.of([RunRow("fedit", "b", tuple(f"c{i}" for i in range(60)), 1, 1, 0)])
    card = model_card(config("b"), CardFacts(4, progress=many))
    assert card.count("| site ") == MOST_SITES and "and 10 more with no more examples" in card


@pytest.mark.parametrize("name", ["a`b|c\n---\nbase_model: evil/model", "x\x1b[31m", "<script>`"])
def test_a_name_of_others_stays_in_its_cell(name: str):
    card = model_card(config(name), facts(name))
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
    assert "the numbers are too good" in model_card(leaky, facts())


def test_scores_of_several_seeds_have_their_interval():
    peers = [summarise(rows(seed=seed, gain=gain)) for seed, gain in enumerate((0.25, 0.3, 0.2))]
    card = model_card(config("some/base"), facts(peers=peers))
    assert "Means over 3 runs that differ in their seed alone" in card
    assert "| loss (nats a token) | 2.000 | 1.000 ± 0.497 |" in card, "Student's t: 4.303 · 0.2 / √3"
    index = yaml.safe_load(card.split("---")[1])["model-index"]
    name, results = model_index_to_eval_results(index)
    loss = next(result for result in results if result.metric_type == "loss")
    assert loss.metric_value == 1.0 and loss.metric_args == {"interval_95": pytest.approx(0.496867, abs=1e-6)}
    assert name.startswith("LoRA adapter on some/base")


@pytest.mark.parametrize("base", ["some/base", "/home/me/model", "x: [\n---"])
@pytest.mark.parametrize("license", [None, "apache-2.0", "our-own-1.0"])
def test_the_metadata_are_what_the_hub_takes(base: str, license: str | None):
    """The rules of its validator, which is online: names of repositories, a licence of its list, results in shape."""
    output = {"license": license, "datasets": ["owner/name", "/home/me/data"]}
    card = model_card(config(base, output={key: value for key, value in output.items() if value}), facts())
    told = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert told["license"] in LICENSES | {"other"} and (told["license"] == "other") == ("license_name" in told)
    assert told["license"] == {None: "unknown", "apache-2.0": "apache-2.0", "our-own-1.0": "other"}[license]
    assert told.get("base_model") in (None, "some/base") and told["datasets"] == ["owner/name"]
    assert all(isinstance(tag, str) and len(tag) < 100 for tag in told["tags"])
    (entry,) = told["model-index"]
    for result in entry["results"]:
        assert result["task"]["type"] == "text-generation" and {"name", "type"} <= result["dataset"].keys()
        assert all(isinstance(metric["value"], float) and metric["type"] for metric in result["metrics"])
    data = ModelCard(card).data
    assert yaml.safe_load(data.to_yaml()) == told, "read and written again by huggingface_hub it is the same"
    assert ("nobody has said one" in card.lower()) == (license is None)


def test_the_validators_call_carries_the_card(monkeypatch: pytest.MonkeyPatch):
    """`ModelCard.validate` asks the Hub: here one on this machine, which refuses what is no metadata."""
    heard = []

    class Validator(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            heard.append(told)
            found = yaml.safe_load(told["content"].split("---")[1])
            self.send_response(200 if found["library_name"] == "peft" else 400)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Validator) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        card = model_card(config("some/base"), facts())
        ModelCard(card).validate(repo_type="model")
        thread.join()
    assert [told["repoType"] for told in heard] == ["model"] and "model-index" in heard[0]["content"]


def test_what_is_not_finite_is_no_result():
    assert "model-index" not in write_header("t", None, scores=[])
    lost = [RunRow("fedit", "b", CLIENTS, 1, 1, 0), Evaluation(0, "a", 0.0, float("nan"))]
    card = model_card(config("b"), CardFacts(4, progress=Progress.of(lost)))
    assert ".nan" not in card and "| loss (nats a token) | – | – |" in card


def test_what_a_run_did_for_privacy_is_named_as_what_it_is():
    from fedloom.report.card_privacy import describe_privacy

    class Settings:
        def model_dump(self) -> dict[str, object]:
            dp = {"epsilon": 8.0, "noise_multiplier": None, "delta": 1e-5}
            return {"training": {"dp": dp}, "privacy": {"secure_aggregation": True}}

    said = describe_privacy(Settings())
    assert "ε = 8 at δ = 1e-05" in said and "single examples" in said and "not all examples of a person" in said
    assert "Secure aggregation" in said and "no differential privacy" in said and "Each update was seen" not in said
