"""What clients' own examples weigh: the bytes that it would take to send the data themselves, compressed once."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import zstandard

from fedloom.model.examples import Example

XZ_LIMIT = 4 * 2**20
"""Bytes of all clients' text up to which xz is used: about two seconds. zstd is much faster, and a little larger."""


@dataclass(frozen=True, slots=True)
class Volume:
    """Client → bytes of its examples, compressed once by `coding`. Empty where the data are not at hand."""

    by_client: Mapping[str, int] = field(default_factory=dict)
    coding: str = ""


def weigh_examples(texts: Mapping[str, Sequence[Example]], limit: int = XZ_LIMIT) -> Volume:
    """Every client's examples, one JSON list a line of the texts that training reads, compressed client by client.

    Other columns are not counted. The smaller and slower of two compressors is used up to `limit` bytes of text in all.
    """
    sizes = accumulate(len(to_line(example)) for held in texts.values() for example in held)
    small = all(size <= limit for size in sizes)
    coding = "xz" if small else "zstd -9"
    return Volume({client: _CODINGS[coding](b"".join(map(to_line, held))) for client, held in texts.items()}, coding)


def to_line(example: Example) -> bytes:
    """An example as canonical text: a line of JSON in UTF-8."""
    row = [example.instruction, example.input, example.output, example.history]
    return (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode(errors="surrogatepass")


def _xz(text: bytes) -> int:
    """xz at its usual level; a dictionary no longer than the text takes the same bytes and less memory."""
    window = min(max(4096, 1 << (len(text) - 1).bit_length() if text else 0), 1 << 23)
    chain = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": window}]
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=chain))


def _zstd(text: bytes) -> int:
    return len(zstandard.ZstdCompressor(level=9).compress(text))


_CODINGS: Mapping[str, Callable[[bytes], int]] = {"xz": _xz, "zstd -9": _zstd}
