"""The same rows as files of every kind that is read."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import zstandard


def table(rows: list[dict[str, str]], separator: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def lines(rows: list[dict[str, str]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def arrow(rows: list[dict[str, str]]) -> bytes:
    sink, data = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(sink, data.schema) as stream:
        stream.write_table(data)
    return sink.getvalue().to_pybytes()


def parquet(rows: list[dict[str, str]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


TEXTS = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": table,
    ".tsv": lambda rows: table(rows, "\t"),
}
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def written(kind: str, rows: list[dict[str, str]]) -> bytes:
    """A file of that kind."""
    if kind in (".parquet", ".arrow"):
        return {".parquet": parquet, ".arrow": arrow}[kind](rows)
    text = next(text for text in TEXTS if kind in [text + end for end in PACKED])
    return PACKED[kind.removeprefix(text)](TEXTS[text](rows))
