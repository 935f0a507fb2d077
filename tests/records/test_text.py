"""Texts of others: shown in one line, told apart, and harmless as names of files."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.records.text import LIMIT, cell, distinct_name, escape_json, file_name, to_printable
from hostile import NAMES, TEXTS, is_tame


@given(TEXTS, st.integers(10, 400))
def test_a_printable_text_is_one_tame_line_and_stays_as_it_is(text: str, limit: int):
    shown = to_printable(text, limit)
    assert is_tame(shown) and "\n" not in shown and len(shown) <= limit
    assert to_printable(shown, limit) == shown
    shown.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Zürich 银行", "Zürich 银行"),
        ("a\x1b[2J", r"a\x1b[2J"),
        ("a\nb\tc", r"a\nb\tc"),
        ("‮x", r"\u202ex"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("x" * (LIMIT + 1), "x" * (LIMIT - 1) + "…"),
    ],
)
def test_what_cannot_be_shown_is_written(text: str, shown: str):
    assert to_printable(text) == shown


@given(TEXTS, TEXTS)
def test_two_names_stay_two(one: str, other: str):
    for named in (distinct_name, file_name):
        assert (named(one) == named(other)) == (one == other)


def test_all_hostile_names_are_told_apart_and_a_made_up_digest_is_no_way_in():
    names = [*NAMES, file_name("a/b"), distinct_name("\x1b"), "x" * 5001]
    assert len({file_name(name) for name in names}) == len({distinct_name(name) for name in names}) == len(names)


@given(TEXTS)
def test_a_file_name_makes_a_file_in_its_folder(tmp_path_factory, text: str):
    folder = tmp_path_factory.mktemp("names")
    name = file_name(text)
    (folder / f"{name}.fedloom").write_text(text, encoding="utf-8", errors="surrogatepass")
    assert os.listdir(folder) == [f"{name}.fedloom"]
    assert name.isascii() and name.isprintable() and name[0] not in "-. " and len(name) <= 200


@pytest.mark.parametrize("name", ["bank", "client-0004", "tau=1.0,client_init=warm", "modules=[q_proj] (2)"])
def test_a_harmless_name_is_its_file(name: str):
    assert file_name(name) == name


@given(st.recursive(TEXTS | st.none(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner)))
def test_escaped_json_says_the_same(value: object):
    text = escape_json(json.dumps(value, ensure_ascii=False))
    assert is_tame(text) and json.loads(text) == value


def test_a_cell_holds_no_markup():
    shown = cell("[link=https://evil.example]x[/link]", "bold")
    assert shown.plain == "[link=https://evil.example]x[/link]" and not shown.spans


def test_a_file_name_is_portable():
    """Labels of comparisons have colons, which Windows forbids, and stay two where they are two."""
    names = ["alone:client-00", "alone_client-00", 'alone"client-00', "florist:tau=1.0"]
    made = [file_name(name) for name in names]
    assert len(set(made)) == 4 and made[1] == "alone_client-00"
    assert not any(set('<>:"/\\|?*') & set(name) for name in made)
