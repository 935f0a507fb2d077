"""What a run, a simulation on Flower and a site's worker say and refuse about their data before the first round."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fedloom.errors import ConfigError, DataError
from fedloom.flower.simulated import actors, simulation
from fedloom.model.examples import Example
from fedloom.records.config import Config
from fedloom.records.configfile import dump, load_config, parse
from fedloom.site.config import SiteConfig, load_site_config
from fedloom.site.desk import Desk
from fedloom.workspace.assemble import load_setup
from fedloom.workspace.data import check_unseen, client_examples, describe_examples, heldout_examples

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
GOOD = {"Frage": "sum 1 2", "Antwort": "3", "topic": "a"}
SETTINGS = f"""
model = {{ path = "{TESTBED}/model", device = "cpu", threads = 1 }}
method = {{ name = "fedit" }}

[data]
source = "./data/{{client}}"
template = "plain"
heldout = "test"
skip_bad_rows = true

[data.columns]
instruction = "Frage"
output = "Antwort"
"""


def written(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Two clients with German columns, a broken line and an empty answer."""
    written(tmp_path / "data" / "ada" / "train.jsonl", GOOD, "{broken", GOOD, {**GOOD, "Antwort": " "})
    written(tmp_path / "data" / "bob" / "train.jsonl", *[GOOD] * 1200)
    written(tmp_path / "data" / "ada" / "test.jsonl", "{broken", GOOD)
    written(tmp_path / "data" / "bob" / "test.jsonl", GOOD)
    written(tmp_path / "my.toml", SETTINGS)
    return load_config(tmp_path / "my.toml")


def expected(folder: Path, split: str = "train", rows: int = 4, line: int = 2) -> str:
    return f"{folder}/data/ada/{split}.jsonl: 1 of {rows} rows left out; the first, line {line}: not valid JSON ("


def test_a_run_says_what_it_left_out_and_what_each_client_holds(config, tmp_path):
    notes = load_setup(config).warnings()
    assert notes[0].startswith(expected(tmp_path))
    assert notes[1].startswith(expected(tmp_path, "test", 2, 1))
    assert notes[2:4] == [
        "examples: ada 3, bob 1,200",
        "client ada: 1 of 3 outputs are empty, which teach to answer nothing",
    ]


def test_a_simulation_on_flower_says_the_same(config, tmp_path, caplog):
    notes: list[str] = []
    named = simulation.with_participants(config, notes.append)
    assert named.federation.participants == ("ada", "bob")
    assert notes[0].startswith(expected(tmp_path)) and notes[1:][0] == "examples: ada 3, bob 1,200"
    with caplog.at_level(logging.WARNING, "fedloom.worker"):
        actors.load_everybody(dump(named))
    assert [note for note in notes if note in caplog.messages] == notes


def test_a_site_reads_its_data_under_its_own_names(config, tmp_path, caplog):
    (tmp_path / "SITE.toml").write_text(
        f'name = "ada"\nmodel = "{TESTBED / "model"}"\ndata = "./data/ada"\ndevice = "cpu"\nskip_bad_rows = true\n'
        '[columns]\ninstruction = "Frage"\noutput = "Antwort"\n'
    )
    site = load_site_config(tmp_path / "SITE.toml")
    of_server = {"data": config.data.model_copy(update={"columns": {"output": "topic"}, "skip_bad_rows": False})}
    named = {"federation": config.federation.model_copy(update={"participants": ("ada", "bob")})}
    with caplog.at_level(logging.WARNING, "fedloom.worker"):
        setup = Desk(site).build_own_setup(config.model_copy(update={**of_server, **named}))
    assert len(setup.sites["ada"].data) == 3, "what the run says of columns means nothing here"
    assert caplog.messages[0].startswith(expected(tmp_path)) and caplog.messages[1] == "examples: ada 3"
    with pytest.raises(ConfigError, match="'outptu' is none of them; did you mean 'output'"):
        (tmp_path / "SITE.toml").write_text('name = "a"\nmodel = "m"\ndata = "d"\n[columns]\noutptu = "A"\n')
        load_site_config(tmp_path / "SITE.toml")
    plain = SiteConfig(name="a", model="m", data="d").reading()
    assert (plain.columns, plain.skip_bad_rows) == ({}, False)


def test_empty_outputs_alone_are_refused():
    empty, full = Example("a", ""), Example("a", "b")
    assert describe_examples({"ada": [full]}, {"ada": [empty, full]}) == [
        "examples: ada 1",
        "held-out set ada: 1 of 2 outputs are empty, which teach to answer nothing",
    ]
    for clients, heldout in (({"ada": [full], "bob": [empty] * 2}, {}), ({"ada": [full]}, {"bob": [empty] * 2})):
        with pytest.raises(DataError, match="bob: all 2 outputs are empty"):
            describe_examples(clients, heldout)
    assert describe_examples({"ada": [], "bob": []}, {}) == []
    many = {f"client-{number:03d}": [full] * (number + 1) for number in range(150)}
    assert describe_examples(many, {}) == ["examples: 1 to 150 at each of 150 clients, 11,325 in all"]


def test_scores_on_what_is_trained_on_are_refused(config, tmp_path):
    for key in ("heldout", "validation"):
        with pytest.raises(ConfigError, match=rf"data\.{key} is \"train\"; expected a split that is not trained on"):
            load_config(tmp_path / "my.toml", [f"data.{key}=train"])

    def checked(*sets: str) -> None:
        check_unseen(load_config(tmp_path / "my.toml", sets).data)

    checked()
    source = tmp_path / "data" / "ada" / "train.jsonl"
    (tmp_path / "link.jsonl").symlink_to(source)
    for heldout in ("train.jsonl", str(source), f"{tmp_path}/data/{{client}}", str(tmp_path / "link.jsonl")):
        with pytest.raises(ConfigError, match=r"data\.heldout reads .*, which is trained on"):
            checked(f"data.heldout={heldout}")
    one = [f"data.source={source}", "data.partitioner=iid", "federation.num_clients=2"]
    with pytest.raises(ConfigError, match="which is trained on"):
        checked(*one, f"data.heldout={source}")
    with pytest.raises(DataError, match="is one file and has no split 'test'"):
        heldout_examples(load_config(tmp_path / "my.toml", one).data)
    checked(*one, f"data.heldout={tmp_path}/data/{{client}}/test.jsonl")
    with pytest.raises(DataError, match=rf"no data at {tmp_path}/nowhere\.jsonl"):
        heldout_examples(load_config(tmp_path / "my.toml", [f"data.heldout={tmp_path}/nowhere.jsonl"]).data)


def test_natural_clients_are_as_many_as_there_are_values():
    data = {"partitioner": "natural", "id_column": "site"}
    with pytest.raises(ConfigError, match="num_clients and data.partitioner = 'natural' exclude each other"):
        parse({"data": data, "federation": {"num_clients": 2}}, "my.toml")
    assert parse({"data": data}, "my.toml").federation.num_clients is None


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.toml").write_text('[model]\npath = "~/m"\n[data]\nsource = "~/d/{client}"\nheldout = "~/h.jsonl"\n')
    config = load_config(tmp_path / "a.toml", ["output.dir=~"])
    assert (config.model.path, config.data.source) == (f"{tmp_path}/m", f"{tmp_path}/d/{{client}}")
    assert (config.data.heldout, config.output.dir) == (f"{tmp_path}/h.jsonl", str(tmp_path))


def test_a_label_is_read_under_its_own_name_beside_named_columns(config, tmp_path):
    split = ["data.partitioner=dirichlet", "data.label_column=topic", "federation.num_clients=2"]
    source = written(tmp_path / "one.jsonl", *[{**GOOD, "topic": f"t{n % 2}"} for n in range(20)])
    texts, manifest = client_examples(load_config(tmp_path / "my.toml", [*split, f"data.source={source}"]))
    assert manifest is not None and sum(map(len, texts.values())) == 20
    assert {example.columns["topic"] for held in texts.values() for example in held} == {"t0", "t1"}
