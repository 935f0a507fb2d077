"""data.sources: every client has sources of its own, each with its own columns and configuration."""

from __future__ import annotations

import tomllib
from pathlib import Path

import datasets
import pytest

import written_data
from fedloom.errors import ConfigError, DataError
from fedloom.records.config import Config
from fedloom.records.configfile import dump, load_config, parse
from fedloom.workspace.data import check_unseen, client_examples, heldout_examples, validation_examples
from fedloom.workspace.resumption import dump_fixed

SETTINGS = """
[data.sources]
code = "./code"
math = ["owner/sums", { source = "./tasks.jsonl", columns = { question = "problem", answer = "solution" } }]
law = { source = "owner/law", subset = "en" }
"""
CODE = [{"instruction": "sort", "output": "sorted(x)"}]
TASKS = [{"problem": "1 + 1", "solution": "2"}, {"problem": "1 + 2", "solution": "3"}]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, a file and two data sets on the Hub, each with a split to score on where it can have one."""
    hub = {
        ("owner/sums", None): {"prompt": "2 + 2 =>", "completion": "4"},
        ("owner/law", "en"): {"text": "the law"},
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: [hub[name, subset]] * len(split))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.jsonl").write_bytes(written_data.lines(CODE))
    (tmp_path / "code" / "test.jsonl").write_bytes(written_data.lines(CODE * 3))
    (tmp_path / "tasks.jsonl").write_bytes(written_data.lines(TASKS))
    (tmp_path / "my.toml").write_text(SETTINGS, encoding="utf-8")
    return tmp_path / "my.toml"


def test_each_client_reads_its_own_sources_one_after_the_other(settings: Path) -> None:
    found, manifest = client_examples(load_config(settings))
    assert manifest is None
    shown = {client: [(e.instruction, e.output) for e in examples] for client, examples in found.items()}
    assert shown["code"] == [("sort", "sorted(x)")] and shown["law"] == [("", "the law")] * 5
    assert shown["math"] == [("2 + 2 =>", "4")] * 5 + [("1 + 1", "2"), ("1 + 2", "3")]


def test_pooled_they_are_split_as_one_source_is(settings: Path) -> None:
    found, manifest = client_examples(load_config(settings, ["data.partitioner=iid", "federation.num_clients=2"]))
    assert manifest is not None and sorted(map(len, found.values())) == [6, 7]


def test_a_held_out_split_is_that_of_each_source(settings: Path) -> None:
    sets = ["data.heldout=test", "data.validation=test", "federation.load_best_model_at_end=true"]
    config = load_config(settings, ["data.sources.math=null", *sets])
    check_unseen(config.data)
    scored = heldout_examples(config.data)
    assert {domain: len(held) for domain, held in scored.items()} == {"code": 3, "law": 4}
    assert validation_examples(config).keys() == {"code", "law"}
    with pytest.raises(DataError, match=r"tasks.jsonl is one file and has no split 'test'"):
        heldout_examples(load_config(settings, sets).data)
    with pytest.raises(ConfigError, match=r"data\.heldout reads .*tasks\.jsonl, which is trained on"):
        check_unseen(load_config(settings, [f"data.heldout={settings.parent}/tasks.jsonl"]).data)


def test_one_client_gets_another_source_and_the_table_another_place(settings: Path, tmp_path: Path) -> None:
    config = load_config(settings, ["data.sources.law=./x", "data.sources.code=null"])
    assert config.data.sources is not None and config.data.sources.keys() == {"math", "law"}
    assert config.data.sources["law"][0].source == str(Path.cwd() / "x")
    assert config.data.sources["math"][1].source == str(tmp_path / "tasks.jsonl")
    one = load_config(settings, ["data.sources=null", f"data.source={tmp_path}/{{client}}/train.jsonl"])
    assert one.data.sources is None and client_examples(one)[0].keys() == {"code"}


def test_settings_with_sources_come_back_as_they_were(settings: Path) -> None:
    config = load_config(settings)
    assert parse(tomllib.loads(dump(config)), "config.toml") == config
    with pytest.raises(ConfigError, match="data.source and data.sources are both set; give one of them"):
        load_config(settings, ["data.source=./data"])


def test_a_run_without_sources_is_the_run_that_it_was() -> None:
    """A new key in what a run is held to would refuse to go on with every earlier run."""
    assert "sources" not in dump_fixed(Config()) and "tasks" not in dump_fixed(Config())


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("3", "data.sources.code is 3; expected a client's source, a table"),
        ("{subset='en'}", "expected a client's source, a table"),
        ("{source='a', subst='en'}", "expected source, subset and columns alone, and not 'subst'"),
        ("{source='a', columns={q='b'}}", "'q' is none of them"),
        ("[]", "data.sources.code is \\[\\]; expected at least 1"),
    ],
)
def test_a_source_that_is_none_is_refused_by_name(settings: Path, value: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(settings, [f"data.sources.code={value}"])


def test_a_number_of_clients_that_does_not_fit_names_the_table(settings: Path) -> None:
    with pytest.raises(ConfigError, match="num_clients is 2, but data.sources holds data for 3"):
        client_examples(load_config(settings, ["federation.num_clients=2"]))
