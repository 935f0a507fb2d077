"""Rows of files, one kind of file a line in `READERS`.

Rows are read one after the other. A row that is broken comes as the DataError that says why, so that it can be left
out; what ends the whole file raises one.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, cast

from fedloom.errors import DataError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

Places: TypeAlias = Iterator[tuple[str, object]]
"""Pairs of a place, such as "line 3", and what is there: a row, something else, or the DataError about it."""

LONGEST_LINE = 2**26
"""Bytes. A line is held whole, and a small packed file may unpack to one that fills the memory."""
LARGEST_JSON = 2**31
"""Bytes of a .json file once unpacked: it has to be held whole."""
BATCH = 1024
"""Rows of a Parquet or Arrow file that are held at once."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def iterate_rows(path: Path) -> Places:
    """Everything that stands in a file. Raises DataError that names the file."""
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; expected {', '.join(READERS)}")
    try:
        yield from READERS[kind](path)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None


def kind_of(path: Path) -> str | None:
    """The ending by which a file is read, in lower case; None where it is of no known kind."""
    name = path.name.lower()
    return max((ending for ending in READERS if name.endswith(ending)), key=len, default=None)


def stem_of(path: Path) -> str:
    """The file's name without the ending by which it is read."""
    return path.name[: len(path.name) - len(kind_of(path) or "")]


def _unpack(read: Callable[[BinaryIO], Places], codec: str | None, path: Path) -> Places:
    """The rows of a text file, packed or not."""
    with path.open("rb") as file:
        if codec is None:
            yield from read(file)
            return
        import pyarrow

        # Unlike zstandard's own reader this one says so when the end of the file is missing.
        with pyarrow.CompressedInputStream(file, codec) as unpacked:
            yield from read(cast(BinaryIO, io.BufferedReader(unpacked, 2**16)))


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(f"line {number} has more than {LONGEST_LINE >> 20} MiB: expected one example a line")
        yield number, line


def _jsonl(stream: BinaryIO) -> Places:
    for number, line in _lines(stream):
        if line.strip():
            yield f"line {number}", _parsed(line)


def _json(stream: BinaryIO) -> Places:
    data = _whole(stream)
    rows = _parsed(data)
    if isinstance(rows, DataError):
        # Many a .json file holds one object a line.
        if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            raise rows
        yield from _jsonl(io.BytesIO(data))
        return
    if not isinstance(rows, list):
        raise DataError(f"holds a {type(rows).__name__}, expected a list of objects, or one object a line")
    for number, row in enumerate(rows, start=1):
        yield f"entry {number}", row


def _whole(stream: BinaryIO) -> bytes:
    parts, size = [], 0
    while part := stream.read(2**20):
        parts.append(part)
        size += len(part)
        if size > LARGEST_JSON:
            raise DataError(f"holds more than {LARGEST_JSON >> 30} GiB: make it .jsonl, which is read line by line")
    return b"".join(parts)


def _parsed(data: bytes) -> object:
    """What JSON means, or the DataError about it."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return DataError("not UTF-8 text" + (", but UTF-16" if data.startswith(_UTF16) else ""))
    except (ValueError, RecursionError) as error:
        return DataError(f"not valid JSON ({error})")


def _table(stream: BinaryIO, separator: str | None = None) -> Places:
    """The rows of a text table under the names in its first row. Without a separator the first row shows it."""
    # The csv module's own limit is 128 KiB a field, for the whole process.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    ended = False

    def decoded() -> Iterator[str]:
        nonlocal ended
        for _, line in _lines(stream):
            # What is no UTF-8 becomes half surrogates, so that one bad row does not end the table.
            yield line.decode("utf-8", "surrogateescape")
        ended = True

    lines = decoded()
    first = next(lines, "").removeprefix("\ufeff")
    if first.encode("utf-8", "surrogateescape").startswith(_UTF16):
        raise DataError("not UTF-8 text, but UTF-16")
    if separator is None:  # where the comma is the decimal sign, spreadsheets write semicolons
        separator = ";" if ";" in first and "," not in first else ","
    rows = csv.reader(chain([first], lines), delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        place = f"line {rows.line_num + 1}"
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if ended:  # all that follows the quote was taken for its text
                raise DataError(f"{place}: a quote is opened and never closed") from None
            if header is None:
                raise DataError(f"{place}: not a header row ({error})") from None
            yield place, DataError(f"not valid CSV ({error})")
            continue
        if header is None:
            header = _header(fields)
        elif fields:
            yield place, _named(header, fields)


def _header(fields: list[str]) -> list[str]:
    names = [name.strip() for name in fields]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"the header row names {twice[0]!r} twice")
    return names


def _named(header: list[str], fields: list[str]) -> object:
    """The row, or the DataError about it."""
    if len(fields) != len(header):
        return DataError(f"{len(fields)} fields under {len(header)} names of the header row")
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:  # a half surrogate, see above
        return DataError("not UTF-8 text")
    return dict(zip(header, fields, strict=True))


def _parquet(path: Path) -> Places:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _rows_of(file.iter_batches(batch_size=BATCH))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _arrow(path: Path) -> Places:
    """Arrow's stream, as `datasets` saves it, or its file format."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                whole = pyarrow.ipc.open_file(file)
                yield from _rows_of(whole.get_batch(index) for index in range(whole.num_record_batches))
            else:
                file.seek(0)
                yield from _rows_of(pyarrow.ipc.open_stream(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable Arrow file ({(str(error).splitlines() or ['empty'])[0]})") from None


def _rows_of(batches: Iterable[RecordBatch]) -> Places:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            for row in _read_batch(batch.slice(start, BATCH)):
                number += 1
                yield f"row {number}", row


def _read_batch(batch: RecordBatch) -> Iterable[object]:
    try:
        return cast("list[object]", batch.to_pylist())
    except ValueError as error:  # a text that is no UTF-8
        if batch.num_rows == 1:
            return [DataError(str(error))]
        return chain.from_iterable(_read_batch(batch.slice(index, 1)) for index in range(batch.num_rows))


_TEXTS: Mapping[str, Callable[[BinaryIO], Places]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".ndjson": _jsonl,
    ".csv": _table,
    ".tsv": partial(_table, separator="\t"),
}
_CODECS = {".gz": "gzip", ".zst": "zstd"}

READERS: Mapping[str, Callable[[Path], Places]] = {
    **{ending: partial(_unpack, _TEXTS[ending], None) for ending in (".jsonl", ".json")},
    ".parquet": _parquet,
    **{ending: partial(_unpack, _TEXTS[ending], None) for ending in (".ndjson", ".csv", ".tsv")},
    ".arrow": _arrow,
    **{text + end: partial(_unpack, read, codec) for text, read in _TEXTS.items() for end, codec in _CODECS.items()},
}
"""Ending of a file's name → what reads its rows. Where a folder has two files of one name, the first kind counts."""
