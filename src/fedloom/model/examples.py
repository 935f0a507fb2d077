"""One row of data → one example.

The form of a row is told by its columns (`FORMS`), or by those that a mapping gives names to:
    instruction, output, and perhaps input      (Alpaca)
    prompt, completion                          (texts, or lists of messages; with label = false it is left out, KTO)
    messages: [{"role": …, "content": …}, …]    (chat; the last message, the assistant's, is what is learnt)
    instruction, response, perhaps context      (Dolly)
    question, answer, perhaps context
    conversations: [{"from": …, "value": …}, …] (ShareGPT)
    chosen, and perhaps prompt                  (preferences; what is rejected is not used)
    text                                        (plain text; all of it is learnt)
Other columns are kept: a partitioner may read a label or an id there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fedloom.errors import DataError

Row: TypeAlias = Mapping[str, object]
Turn: TypeAlias = tuple[str, str]
"""Role and content."""


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction (with an input, and turns before it, where there are any) and the answer to learn.

    form: of the row that it was: "instruction", "prompt", "messages" or "text". Plain text is all answer.
    """

    instruction: str
    output: str
    input: str = ""
    history: tuple[tuple[str, str], ...] = ()
    columns: Mapping[str, object] = field(default_factory=dict)
    form: str = "instruction"


class UndesiredError(DataError):
    """A whole row whose answer is marked as one not to give."""


@dataclass(frozen=True, slots=True)
class Form:
    """A form of rows. needs: the columns that tell it; takes: those that are read where they are there.

    preference: beside what is learnt such a row has an answer that is not used.
    """

    needs: tuple[str, ...]
    read: Callable[[Row], Example]
    takes: tuple[str, ...] = ()
    preference: bool = False


def to_example(row: Row, columns: Mapping[str, str] | None = None) -> Example:
    """Raises DataError (without saying where) for a row of no known form, UndesiredError for one marked as bad.

    columns: name that is read → name in the row, for rows whose columns have names of their own.
    """
    return read_row(row, columns or {})[0]


def read_row(row: Row, columns: Mapping[str, str]) -> tuple[Example, Form]:
    """`to_example`, and the form that the row had."""
    named = _renamed(row, columns) if columns else row
    for form in FORMS:
        if all(column in named for column in form.needs) and columns.keys() <= {*form.needs, *form.takes}:
            example = form.read(named)
            return (replace(example, columns=row) if columns else example), form
    forms = [" and ".join(form.needs) for form in FORMS if not columns or columns.keys() <= {*form.needs, *form.takes}]
    given = f" (with data.columns: {', '.join(sorted(named))})" if columns else ""
    raise DataError(
        f"columns {', '.join(map(str, sorted(row))) or '(none)'}{given} make no example: expected "
        f"{', or '.join(forms)}; data.columns gives names to others (docs/data.md)"
    )


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under the names that are read. A column that was renamed is not there under its old name too."""
    for name, own in columns.items():
        if own not in row:
            found = ", ".join(map(str, sorted(row))) or "(none)"
            raise DataError(f"there is no column {own!r}, which columns.{name} names; found {found}")
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return {**kept, **{name: row[own] for name, own in columns.items()}}


def _from_alpaca(row: Row) -> Example:
    given = row.get("input")
    return Example(
        _text(row, "instruction"), _text(row, "output"), "" if given is None else _text(row, "input"), (), row
    )


def _from_dolly(row: Row) -> Example:
    return Example(_text(row, "instruction"), _text(row, "response"), _given(row), (), row)


def _from_question(row: Row) -> Example:
    return Example(_text(row, "question"), _text(row, "answer"), _given(row), (), row)


def _given(row: Row) -> str:
    """What an instruction is about: the context, or the input."""
    filled = [column for column in ("context", "input") if row.get(column) not in (None, "")]
    if len(filled) > 1:
        raise DataError("columns context and input both have a text; one of them is expected")
    return _text(row, filled[0]) if filled else ""


def _from_prompt(row: Row) -> Example:
    label = row.get("label")
    if label is False or (isinstance(label, str) and label.lower() == "false"):  # as a CSV file writes it
        raise UndesiredError("label is false: the answer is one not to give")
    if isinstance(row["prompt"], list):
        return _from_turns([*_turns(row, "prompt"), *_turns(row, "completion")], row)
    return Example(_text(row, "prompt"), _text(row, "completion"), columns=row, form="prompt")


def _from_messages(row: Row) -> Example:
    return _from_turns(_turns(row, "messages"), row)


def _from_conversations(row: Row) -> Example:
    return _from_turns(_turns(row, "conversations"), row, "conversations")


def _from_chosen(row: Row) -> Example:
    """What is chosen is a text, the messages that answer the prompt, or a whole conversation."""
    prompt = row.get("prompt")
    if not isinstance(row["chosen"], list):
        if prompt is None:
            raise DataError("column chosen is no list of messages, so that it needs a column prompt beside it")
        return Example(_text(row, "prompt"), _text(row, "chosen"), columns=row, form="prompt")
    turns = _turns(row, "chosen")
    if isinstance(prompt, list):
        turns = [*_turns(row, "prompt"), *turns]
    elif prompt is not None and all(role != "user" for role, _ in turns):
        turns = [("user", _text(row, "prompt")), *turns]
    return _from_turns(turns, row, "chosen")


def _from_text(row: Row) -> Example:
    return Example("", _text(row, "text"), columns=row, form="text")


def _from_turns(turns: Sequence[Turn], row: Row, column: str = "messages") -> Example:
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        roles = ", ".join(role for role, _ in turns) or "none"
        raise DataError(f"{column} must end with a user's and then the assistant's, found roles: {roles}")
    return Example(turns[-2][1], turns[-1][1], "", tuple(turns[:-2]), row, "messages")


_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names for them; others are as everywhere."""


def _turns(row: Row, column: str) -> list[Turn]:
    """The messages in a column, with keys role and content, or from and value."""
    messages = row[column]
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        keys = '{"from": …, "value": …}' if column == "conversations" else '{"role": …, "content": …}'
        raise DataError(f"column {column} must be a list of {keys}")
    return [_turn(turn) for turn in messages]


def _turn(turn: Row) -> Turn:
    role, content = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    who = _text(turn, role)
    if turn.get(content, "") is None:
        raise DataError(f"a message of role {who} has no text ({content} is null): tool calls are not read")
    return _ROLES.get(who, who) if role == "from" else who, _text(turn, content)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        found = "is missing" if column not in row else f"is {type(value).__name__}, not text"
        raise DataError(f"column {column} {found}")
    return value


FORMS: tuple[Form, ...] = (
    Form(("instruction", "output"), _from_alpaca, ("input",)),
    Form(("prompt", "completion"), _from_prompt, ("label",)),
    Form(("messages",), _from_messages),
    Form(("instruction", "response"), _from_dolly, ("context", "input")),
    Form(("question", "answer"), _from_question, ("context", "input")),
    Form(("conversations",), _from_conversations),
    Form(("chosen",), _from_chosen, ("prompt", "rejected"), preference=True),
    Form(("text",), _from_text),
)
"""The first whose columns are all there is a row's. `records.sections.data.READ_COLUMNS` has the same columns."""
