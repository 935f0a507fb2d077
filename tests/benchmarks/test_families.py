"""The table of model families: a handful each time, and all of them behind `make check-slow`."""

import re
from pathlib import Path

import pytest
from benchmarks.tiny_configs import families as all_families

from benchmarks import families
from fedloom.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "families.md"
HANDFUL = {
    "gemma3": ("yes", "yes", "yes", ""),  # B1: of the multimodal class
    "qwen3_next": ("yes", "yes", "yes", "yes"),  # B2: PEFT takes its shared expert for another
    "mamba": ("yes", "yes", "yes", ""),  # PEFT adapts no out_proj there
    "phimoe": ("yes", "yes", "yes", "yes"),  # its router is a linear module by name alone
    "bert": ("refused", "", "", ""),  # W8
    "bart": ("refused", "", "", ""),  # its own loss does not shift labels
}


def outcomes(result):
    return {row["family"]: (row["runs"], row["plain"], row["merge"], row["experts"]) for row in result["rows"]}


def test_a_handful_of_families():
    result = families.run(list(HANDFUL))
    assert outcomes(result) == HANDFUL, result["rows"]
    assert families.parse_page(families.to_markdown(result)) == HANDFUL
    told = {row["family"]: row["remark"] for row in result["rows"]}
    assert "is_decoder" in told["bert"] and not told["gemma3"]


def test_a_family_that_there_is_not():
    with pytest.raises(ConfigError, match="family 'lama' is unknown: expected one such as llama"):
        families.run(["lama"])


def test_the_page_has_every_family():
    assert families.parse_page(PAGE.read_text(encoding="utf-8")).keys() == set(all_families())


def test_the_page_counts_what_stands_on_it():
    page = PAGE.read_text(encoding="utf-8")
    told = families.parse_page(page)
    assert families.count_line(told) in page
    shown = [int(number) for number in re.findall(r"\((\d+)\)</summary>", page)]
    assert shown == [sum(row[0] == word for row in told.values()) for word in ("refused", "")]


@pytest.mark.slow
def test_every_family_does_what_the_page_says():
    found, told = outcomes(families.run()), families.parse_page(PAGE.read_text(encoding="utf-8"))
    assert {name: found[name] for name in found if found[name] != told[name]} == {}
