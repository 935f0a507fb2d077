"""Examples from files or the Hub.

A row has one of four forms, told apart by its columns:
    instruction, output, and perhaps input      (Alpaca)
    prompt, completion
    messages: [{"role": …, "content": …}, …]    (chat; the last message, the assistant's, is what is learnt)
    text                                        (plain text; all of it is learnt)
Other columns are kept: a partitioner may read a label or an id there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from fedloom.errors import DataError

Row: TypeAlias = Mapping[str, object]


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


def to_example(row: Row) -> Example:
    """Raises DataError (without saying where) for a row of no known form."""
    for needed, read in _FORMS.items():
        if all(column in row for column in needed):
            return read(row)
    raise DataError(
        f"columns {', '.join(sorted(row)) or '(none)'} make no example: expected instruction and output (and perhaps "
        "input), or prompt and completion, or messages, or text"
    )


def _from_alpaca(row: Row) -> Example:
    given = row.get("input")
    return Example(
        _text(row, "instruction"), _text(row, "output"), "" if given is None else _text(row, "input"), (), row
    )


def _from_prompt(row: Row) -> Example:
    return Example(_text(row, "prompt"), _text(row, "completion"), columns=row, form="prompt")


def _from_messages(row: Row) -> Example:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise DataError('column messages must be a list of {"role": …, "content": …}')
    turns = tuple((_text(turn, "role"), _text(turn, "content")) for turn in messages)
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        roles = ", ".join(role for role, _ in turns) or "none"
        raise DataError(f"messages must end with a user's and then the assistant's, found roles: {roles}")
    return Example(turns[-2][1], turns[-1][1], "", turns[:-2], row, "messages")


def _from_text(row: Row) -> Example:
    return Example("", _text(row, "text"), columns=row, form="text")


_FORMS: Mapping[tuple[str, ...], Callable[[Row], Example]] = {
    ("instruction", "output"): _from_alpaca,
    ("prompt", "completion"): _from_prompt,
    ("messages",): _from_messages,
    ("text",): _from_text,
}


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        found = "is missing" if column not in row else f"is {type(value).__name__}, not text"
        raise DataError(f"column {column} {found}")
    return value


def load_examples(source: str | Path, split: str = "train") -> list[Example]:
    """All examples of a file, of a folder's `split` (<split>.jsonl, .json or .parquet, or a file of that very name),
    or of a Hub data set, named owner/name.

    Raises DataError that names file and line where something is missing, empty or of no known form.
    """
    path = Path(source)
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        return read_file(split_file(path, split))
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(source)) and path.suffix not in READERS:
        return _from_hub(str(source), split)
    raise DataError(
        f"no data at {source}: expected a JSONL or Parquet file, a folder, or a Hub name such as owner/name"
    )


def split_file(folder: Path, split: str) -> Path:
    """The file of a folder that holds a split. Raises DataError if there is none."""
    names = [split, *(f"{split}{ending}" for ending in READERS)]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise DataError(f"{folder} holds no split {split!r}: expected {' or '.join(names[1:])}, found {held}")


def client_sources(source: str | Path) -> dict[str, Path]:
    """Client → its file or folder, where every client has one.

    `source` is a folder (each sub-folder, else each data file in it, is a client), or a path with {client} in it.
    """
    text = str(source)
    if "{client}" not in text:
        folder = Path(source)
        if not folder.is_dir():
            raise DataError(f"{source} is not a folder: expected one with a sub-folder or a data file for each client")
        found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        found = found or [path for path in folder.iterdir() if path.suffix in READERS]
        clients = {path.name if path.is_dir() else path.stem: path for path in found}
    else:
        head, tail = text.split("{client}", 1)
        above, start = (Path(head), "") if head.endswith("/") else (Path(head).parent, Path(head).name)
        inner, _, below = tail.partition("/")
        names = [path.name for path in (above.iterdir() if above.is_dir() else ())]
        fits = [name for name in names if name.startswith(start) and name.endswith(inner) and not name.startswith(".")]
        clients = {name[len(start) : len(name) - len(inner)]: above / name / below for name in fits}
        clients = {name: path for name, path in clients.items() if name and path.exists()}
    if not clients:
        raise DataError(f"{source}: no client's file or folder found there")
    return dict(sorted(clients.items()))


def read_file(path: Path) -> list[Example]:
    """All examples of one file. Raises DataError naming file and line."""
    reader = READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; expected {', '.join(READERS)}")
    examples = list(_located(path, reader(path)))
    if not examples:
        raise DataError(f"{path} holds no examples")
    return examples


def _located(path: Path | str, rows: Iterable[tuple[str, object]]) -> Iterator[Example]:
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, {place}: a {type(row).__name__}, expected an object with named columns")
        try:
            yield to_example(row)
        except DataError as error:
            raise DataError(f"{path}, {place}: {error}") from None


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", _parse(path, f"line {number}", line)


def _json(path: Path) -> Iterator[tuple[str, object]]:
    rows = _parse(path, "the file", path.read_bytes())
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds a {type(rows).__name__}, expected a list of objects; name it .jsonl if it is one a line"
        )
    for number, row in enumerate(rows, start=1):
        yield f"entry {number}", row


def _parse(path: Path, place: str, data: bytes) -> object:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{path}, {place}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, {place}: not valid JSON ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]})") from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


READERS: Mapping[str, Callable[[Path], Iterator[tuple[str, object]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
"""Ending of a file's name → what reads its rows."""


def _from_hub(name: str, split: str) -> list[Example]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"no file or folder {name}; to read it from the Hub: pip install 'fedloom[hub]'") from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library lets through whatever its network stack raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"no file or folder {name}, and no split {split!r} of a Hub data set of that name ({reason})"
        ) from None
    examples = list(_located(name, ((f"row {number}", dict(row)) for number, row in enumerate(rows, start=1))))
    if not examples:
        raise DataError(f"Hub data set {name}, split {split!r}, holds no examples")
    return examples
