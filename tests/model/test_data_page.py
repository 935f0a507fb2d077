"""docs/data.md says what is read: every row of its tables is read here, or by the test that it is held against."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedloom.model.datafiles import READERS
from fedloom.model.examples import FORMS, read_row
from fedloom.model.partition import PARTITIONERS
from fedloom.model.sources import client_sources, load_examples
from fedloom.records.config import DataSettings
from fedloom.records.configfile import parse
from written_data import written

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(title: str, head: str) -> list[list[str]]:
    """The cells of the table that begins with a head, in a section."""
    found = re.search(rf"^\| {re.escape(head)} \|.*\n\|[-|]+\|\n((?:\|.*\|\n)+)", section(title), re.MULTILINE)
    assert found, title
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ROWS = [
    json.loads(line) for line in re.findall(r"```json\n(.*?)```", section("Forms of rows"), re.DOTALL)[0].splitlines()
]
FORM_ROWS = table("Forms of rows", "columns")


@pytest.mark.parametrize("number", range(len(FORM_ROWS)))
def test_a_form_of_the_page_is_read_as_it_says(number):
    columns, learnt, _, form = FORM_ROWS[number]
    row = ROWS[number]
    needed = names(columns.partition("perhaps")[0])
    assert set(needed) <= row.keys() <= set(names(columns))
    answer = row[names(learnt)[0]]
    found = read_row(row, {})[0]
    assert (found.form, found.output) == (form, answer if isinstance(answer, str) else list(answer[-1].values())[-1])
    # The same row with other names for its columns, which the settings are told.
    other = {f"my {name}": value for name, value in row.items()}
    settings = DataSettings(columns={name: f"my {name}" for name in row})
    assert read_row(other, settings.columns)[0].output == found.output
    with pytest.raises(Exception, match="make no example"):
        read_row({name: value for name, value in row.items() if name != needed[-1]}, {})


def test_every_form_has_its_row_on_the_page():
    assert len(ROWS) == len(FORM_ROWS)
    assert {id(read_row(row, {})[1]) for row in ROWS} == set(map(id, FORMS))


def test_every_kind_of_file_is_on_the_page():
    listed = [ending for _, endings, _ in table("Kinds of files", "kind") for ending in names(endings)]
    assert sorted(listed) == sorted(READERS), "test_every_kind_of_file_says_the_same reads each"


@pytest.mark.parametrize("row", table("Who holds what", "`data.source`"))
def test_a_layout_of_the_page_gives_its_clients(row, tmp_path, monkeypatch):
    source, files, clients = map(names, row)
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(written(path.name[path.name.index(".") :], [{"instruction": "a", "output": name}]))
    monkeypatch.chdir(tmp_path)
    found = client_sources(source[0])
    assert list(found) == clients
    assert [load_examples(path)[0].output for path in found.values()] == files


def test_every_partitioner_is_on_the_page_with_what_it_needs():
    rows = table("Who holds what", "`data.partitioner`")
    assert {names(kind)[0] for kind, _, _ in rows} == set(PARTITIONERS)
    values = {"num_clients": 2, "label_column": "topic", "id_column": "site"}
    for kind, _, needs in rows:
        keys = [key.split(".") for key in names(needs.partition(";")[0])]
        tree = {"data": {"partitioner": names(kind)[0]}, "federation": {}}
        for section_, key in keys:
            with pytest.raises(Exception, match=f"{key} is missing"):
                parse(tree, "page")
            tree[section_][key] = values[key]
        assert parse(tree, "page").data.partitioner == names(kind)[0]
