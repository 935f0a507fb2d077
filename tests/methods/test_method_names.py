"""How methods are called: other names and spellings, likely slips, and server optimisers, which are no methods."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedloom.adapters.merge.combine import Recipe
from fedloom.cli.inspect import method_rows, method_table
from fedloom.errors import ConfigError
from fedloom.methods.table import ALIASES, METHODS, SERVER_OPTIMISERS, build, method_name, server_options
from fedloom.records.config import Config
from fedloom.studies.compare import expand_variant, split_variant


@pytest.mark.parametrize(
    ("text", "name"),
    [("FedIT", "fedit"), ("fedavg", "fedit"), ("FedAvg", "fedit"), ("LoRA-FAIR", "lora-fair"), ("fed_sb", "fed-sb")],
)
def test_a_method_is_known_by_other_names_and_spellings(text: str, name: str):
    assert method_name(text) == build(text).name == name
    assert split_variant(f"{text}:server_optimizer=fedadam") == (name, "server_optimizer=fedadam")
    assert f"method.name={name}" in expand_variant(Config(), text)[text]


def test_adapters_are_merged_by_methods_of_any_spelling():
    assert Recipe("FedAvg").build().name == "fedit" and Recipe("LoRA_FAIR").build().name == "lora-fair"


def test_another_name_of_a_method_is_told_as_such():
    assert "FedAvg of the two LoRA factors" in build("FedAvg").advise(None, None)
    assert build("FedIT").advise(None, None) == "", "the same name in other letters needs no word"
    assert build("fedavg", {"server_optimizer": "fedadam"}).facts.keeps == "server: moments of fedadam"
    assert not set(ALIASES) & set(METHODS)


@pytest.mark.parametrize(
    ("slip", "meant"), [("fedsdr", "fedsrd"), ("fedsrdd", "fedsrd"), ("FedSVDD", "fedsvd"), ("hetlroa", "hetlora")]
)
def test_a_slip_is_answered_with_what_was_meant(slip: str, meant: str):
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        build(slip)


@pytest.mark.parametrize("name", SERVER_OPTIMISERS)
def test_a_server_optimiser_is_no_method_and_says_how_it_is_used(name: str):
    with pytest.raises(ConfigError, match=f'method.name = "fedit" and method.server_optimizer = "{name}"'):
        build(name)
    assert build("fedit", {"server_optimizer": name}).name == "fedit"


def test_every_method_that_takes_a_server_optimiser_says_so():
    for name in METHODS:
        if server_options(name):
            build(name, {"server_optimizer": "fedavgm", "server_momentum": 0.5})
        else:
            with pytest.raises(ConfigError):
                build(name, {"server_optimizer": "fedavgm"})


def test_the_list_of_methods_shows_server_optimisers_ranks_and_other_names():
    rows = {row["name"]: row for row in method_rows()}
    assert rows["fedit"]["server_options"]["server_learning_rate"] == 1.0 and not rows["florist"]["server_options"]
    out = io.StringIO()
    Console(file=out, width=200).print(method_table(list(rows.values())))
    lines = {line.split()[0]: line for line in out.getvalue().splitlines() if line.split()}
    assert "server_optimizer" in lines["fedit"] and "another name of fedit" in lines["fedavg"]
    assert 'method.server_optimizer = "fedavgm" or "fedadam"' in out.getvalue()
    ranks = {name: "own part" if row["own_part"] else "whole" for name, row in rows.items()}
    assert (ranks["fedit"], ranks["fedsrd"], ranks["florist"]) == ("own part", "whole", "whole")
