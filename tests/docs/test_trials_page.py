"""The pages of trials name tests that are there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PAGES = sorted((REPO / "docs").glob("trials*.md"))
FEWEST = 20
"""Tests that a page names at least: fewer, and its table is cut or written in another form than is read here."""
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def tops(file: str) -> frozenset[str]:
    """The functions and classes at the top of a file of tests; none where there is no such file."""
    path = REPO / file
    if not path.is_file():
        return frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))


def not_there(text: str) -> list[str]:
    return [f"{file}::{name}" for file, name in NAMED.findall(text) if name not in tops(file)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert not_there(text) == []
    assert len(set(NAMED.findall(text))) >= FEWEST
    assert text.count("::") == len(NAMED.findall(text)), "a test is named in another form than is read here"


def test_the_two_halves_of_the_trial_have_a_page():
    assert [page.name for page in PAGES] == ["trials-friction.md", "trials.md"]


def test_a_misspelt_name_is_found():
    here = "`tests/docs/test_trials_page.py::"
    assert not_there(f"{here}test_a_misspelt_name_is_found`") == []
    wrong = "test_a_mispelt_name_is_found"
    assert not_there(f"{here}{wrong}`") == [f"tests/docs/test_trials_page.py::{wrong}"]
    assert not_there("`tests/docs/test_trails_page.py::test_a`") == ["tests/docs/test_trails_page.py::test_a"]
