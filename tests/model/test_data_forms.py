"""Every form of row that is read, columns of other names, and rows that are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedloom.errors import ConfigError, DataError
from fedloom.model.examples import FORMS, Example, UndesiredError, to_example
from fedloom.model.sources import load_examples
from fedloom.records.config import DataSettings
from fedloom.records.configfile import load_config, parse
from fedloom.records.sections.data import READ_COLUMNS


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def said(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


SYSTEM = {"role": "system", "content": "s"}
LONG = [said("system", "s"), said("user", "1"), said("gpt", "2"), said("human", "q"), said("assistant", "a")]
CHOSEN, REJECTED = [user("q"), assistant("a")], [user("q"), assistant("b")]
READ = [
    ({"question": "q", "answer": "a"}, Example("q", "a")),
    ({"question": "q", "answer": "a", "context": "c"}, Example("q", "a", "c")),
    ({"question": "q", "answer": "a", "context": None}, Example("q", "a")),
    ({"instruction": "q", "response": "a", "context": "c", "category": "x"}, Example("q", "a", "c")),
    ({"instruction": "q", "response": "a", "context": ""}, Example("q", "a")),
    ({"instruction": "q", "response": "a", "input": "c"}, Example("q", "a", "c")),
    ({"text": "a"}, Example("", "a", form="text")),
    ({"conversations": [said("human", "q"), said("gpt", "a")]}, Example("q", "a", form="messages")),
    (
        {"conversations": LONG},
        Example("q", "a", "", (("system", "s"), ("user", "1"), ("assistant", "2")), form="messages"),
    ),
    ({"conversations": [user("q"), assistant("a")]}, Example("q", "a", form="messages")),
    ({"messages": [said("human", "q"), said("gpt", "a")]}, Example("q", "a", form="messages")),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, Example("q", "a", form="prompt")),
    ({"chosen": CHOSEN, "rejected": REJECTED}, Example("q", "a", form="messages")),
    (
        {"prompt": [SYSTEM, user("q")], "chosen": [assistant("a")]},
        Example("q", "a", "", (("system", "s"),), form="messages"),
    ),
    ({"prompt": "q", "chosen": [user("q"), assistant("a")]}, Example("q", "a", form="messages")),
    ({"prompt": "q", "chosen": [assistant("a")]}, Example("q", "a", form="messages")),
    ({"prompt": [user("q")], "completion": [assistant("a")]}, Example("q", "a", form="messages")),
    ({"prompt": [user("q")], "completion": [assistant("a")], "label": True}, Example("q", "a", form="messages")),
    ({"prompt": "q", "completion": "a", "label": "sums"}, Example("q", "a", form="prompt")),
    # Where a row has the columns of two forms, it is read as it was before there were more of them.
    ({"instruction": "q", "output": "a", "response": "b", "question": "c", "answer": "d"}, Example("q", "a")),
    ({"prompt": "q", "completion": "a", "chosen": "b", "rejected": "c"}, Example("q", "a", form="prompt")),
    ({"text": "t", "question": "q", "answer": "a"}, Example("q", "a")),
]


@pytest.mark.parametrize(("row", "expected"), READ, ids=range(len(READ)))
def test_a_form_is_told_by_its_columns(row, expected):
    found = to_example(row)
    assert found.columns == row
    assert found == Example(expected.instruction, expected.output, expected.input, expected.history, row, expected.form)


UNREAD = [
    ({"question": "q"}, "columns question make no example: .*question and answer.*docs/data.md"),
    ({"question": "q", "answer": ["a"]}, "column answer is list, not text"),
    ({"question": "q", "answer": "a", "context": "c", "input": "d"}, "context and input both have a text"),
    ({"instruction": "q", "response": None}, "column response is NoneType"),
    ({"conversations": "q"}, 'conversations must be a list of {"from"'),
    ({"conversations": []}, "conversations must end with a user's and then the assistant's, found roles: none"),
    ({"conversations": [said("gpt", "a"), said("human", "q")]}, "found roles: assistant, user"),
    ({"conversations": [said("human", "q"), {"from": "gpt"}]}, "column value is missing"),
    ({"chosen": "a", "rejected": "b"}, "needs a column prompt"),
    ({"prompt": "q", "chosen": [user("q")]}, "chosen must end with .*found roles: user"),
    ({"prompt": [user("q")], "completion": "a"}, "column completion must be a list"),
    ({"prompt": "q", "completion": [assistant("a")]}, "column completion is list, not text"),
    (
        {"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]},
        "a message of role assistant has no text .*tool calls are not read",
    ),
]


@pytest.mark.parametrize(("row", "reason"), UNREAD, ids=range(len(UNREAD)))
def test_what_no_form_reads_is_refused(row, reason):
    with pytest.raises(DataError, match=reason) as caught:
        to_example(row)
    assert "\n" not in str(caught.value)


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_an_answer_that_is_marked_as_bad_is_never_learnt(tmp_path):
    for label in (False, "False", "false"):
        for row in ({"prompt": "q", "completion": "a"}, {"prompt": [user("q")], "completion": [assistant("a")]}):
            with pytest.raises(UndesiredError):
                to_example({**row, "label": label})
    rows = [{"prompt": f"{n}", "completion": "a", "label": n % 2 == 0} for n in range(5)]
    notes: list[str] = []
    found = load_examples(written(tmp_path / "a.jsonl", *rows), tell=notes.append)
    assert [example.instruction for example in found] == ["0", "2", "4"]
    assert len(notes) == 1 and "2 rows left out whose label is false" in notes[0]
    with pytest.raises(DataError, match="holds no examples: 1 rows left out whose label is false"):
        load_examples(written(tmp_path / "b.jsonl", rows[1]))


def test_a_note_says_that_rejected_answers_are_not_used(tmp_path):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    notes: list[str] = []
    found = load_examples(written(tmp_path / "a.jsonl", pair, pair), tell=notes.append)
    assert [example.output for example in found] == ["a", "a"]
    assert notes == [
        f"{tmp_path / 'a.jsonl'}: 2 rows are preferences: what is chosen is learnt, the rejected answers are not used"
    ]


def test_the_settings_know_the_columns_of_every_form():
    assert [(*form.needs, *form.takes) for form in FORMS] == list(READ_COLUMNS)


MAPPED = [
    ({"instruction": "Frage", "output": "Antwort"}, {"Frage": "q", "Antwort": "a"}, Example("q", "a")),
    (
        {"instruction": "F", "output": "A", "input": "K"},
        {"F": "q", "A": "a", "K": None, "output": "no"},
        Example("q", "a"),
    ),
    ({"output": "reply"}, {"instruction": "q", "reply": "a", "input": "c"}, Example("q", "a", "c")),
    ({"answer": "reply"}, {"question": "q", "reply": "a", "text": "t"}, Example("q", "a")),
    # A column that stands for another is not read under its own name as well.
    ({"instruction": "input"}, {"input": "q", "output": "a"}, Example("q", "a")),
    ({"instruction": "output", "output": "instruction"}, {"output": "q", "instruction": "a"}, Example("q", "a")),
    # What is named counts, whatever else the row has.
    ({"text": "body"}, {"instruction": "q", "output": "b", "body": "a"}, Example("", "a", form="text")),
    ({"messages": "chat"}, {"chat": [user("q"), assistant("a")], "text": "t"}, Example("q", "a", form="messages")),
    ({"label": "liked"}, {"prompt": "q", "completion": "a", "liked": True}, Example("q", "a", form="prompt")),
    ({"prompt": "question"}, {"question": "q", "chosen": "a", "rejected": "b"}, Example("q", "a", form="prompt")),
]


@pytest.mark.parametrize(("columns", "row", "expected"), MAPPED, ids=range(len(MAPPED)))
def test_columns_of_other_names(tmp_path, columns, row, expected):
    settings = DataSettings(columns=columns)
    found = load_examples(written(tmp_path / "a.jsonl", row), settings=settings)
    assert found == [
        Example(expected.instruction, expected.output, expected.input, expected.history, row, expected.form)
    ]


def test_a_named_column_that_is_missing(tmp_path):
    path = written(tmp_path / "a.jsonl", {"F": "q", "A": "a"}, {"F": "q", "B": "a"})
    settings = DataSettings(columns={"instruction": "F", "output": "A"})
    with pytest.raises(DataError) as caught:
        load_examples(path, settings=settings)
    assert str(caught.value) == f"{path}, line 2: there is no column 'A', which columns.output names; found B, F"
    with pytest.raises(DataError, match=r"columns A, F \(with data.columns: A, instruction\) make no example"):
        load_examples(path, settings=DataSettings(columns={"instruction": "F"}))


def test_a_bad_example_of_a_named_label_is_not_learnt(tmp_path):
    path = written(tmp_path / "a.jsonl", {"prompt": "q", "completion": "a", "liked": False})
    with pytest.raises(DataError, match="label is false"):
        load_examples(path, settings=DataSettings(columns={"label": "liked"}))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"instrction": "F"}, r"data\.columns.*'instrction' is none of them; did you mean 'instruction'\?"),
        ({"Frage": "instruction"}, r"'Frage' is none of them; there are instruction, output"),
        ({"instruction": "F", "completion": "A"}, "no form has instruction and completion"),
        ({"instruction": 3}, r"data\.columns is 3, a whole number; expected a string"),
    ],
)
def test_names_that_no_form_reads_are_refused(columns, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        parse({"data": {"columns": columns}}, "my.toml")
    assert "\n" not in str(caught.value)


def test_columns_in_a_file_and_on_the_command_line(tmp_path):
    (tmp_path / "my.toml").write_text('[data.columns]\ninstruction = "Frage"\noutput = "Antwort"\n', encoding="utf-8")
    config = load_config(tmp_path / "my.toml", ["data.columns.output=reply"])
    assert config.data.columns == {"instruction": "Frage", "output": "reply"}
    with pytest.raises(ConfigError, match="did you mean 'output'"):
        load_config(tmp_path / "my.toml", ["data.columns.outptu=reply"])


BROKEN = [
    b'{"instruction": "a", "output"',
    b'{"instruction": "a"}',
    b'{"instruction": "a", "output": 3}',
    b'{"instruction": "a", "output": "\xff"}',
    b"[1, 2]",
]


def test_bad_rows_are_skipped_where_the_settings_say_so(tmp_path):
    good = b'{"instruction": "a", "output": "b"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, *BROKEN, good, b""]))
    notes: list[str] = []
    found = load_examples(path, settings=DataSettings(skip_bad_rows=True), tell=notes.append)
    assert [example.output for example in found] == ["b", "b"]
    assert len(notes) == 1
    assert notes[0].startswith(f"{path}: 5 of 7 rows left out; the first, line 2: not valid JSON (")
    assert notes[0].endswith("as data.skip_bad_rows says")
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        load_examples(path)
    path.write_bytes(b"\n".join(BROKEN))
    with pytest.raises(DataError, match="holds no examples: 5 of 5 rows left out; the first, line 1: not valid JSON"):
        load_examples(path, settings=DataSettings(skip_bad_rows=True))
