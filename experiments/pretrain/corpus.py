"""Debian packages → one file of documents, shuffled and without repetitions."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from experiments.pretrain.text import documents
from fedloom.errors import DataError

SOURCES = Path(__file__).with_name("sources.toml")
HELD_OUT = 100
"""One document of so many is for the base's own test, never trained on."""


@dataclass(frozen=True, slots=True)
class Source:
    """A package and which of its files are read, how."""

    package: str
    kind: str
    files: str


def sources() -> list[Source]:
    """The packages of sources.toml."""
    return [Source(**entry) for entry in tomllib.loads(SOURCES.read_text(encoding="utf-8"))["source"]]


def fetch(source: Source, folder: Path) -> Path:
    """Download and unpack a package, once. Raises DataError where apt cannot."""
    unpacked = folder / source.package
    if unpacked.is_dir():
        return unpacked
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"the corpus is made of Debian's packages, and {tool} is missing: use a Debian or Ubuntu")
    downloads = folder / "downloads" / source.package
    downloads.mkdir(parents=True, exist_ok=True)
    got = subprocess.run(["apt-get", "download", source.package], cwd=downloads, capture_output=True, text=True)
    archives = sorted(downloads.glob("*.deb"))
    if got.returncode or not archives:
        reason = (got.stderr.strip().splitlines() or ["no file came"])[-1]
        raise DataError(f"package {source.package} was not downloaded ({reason}): try apt-get update")
    temporary = folder / f".{source.package}"
    subprocess.run(["dpkg-deb", "--extract", str(archives[0]), str(temporary)], check=True)
    temporary.rename(unpacked)
    return unpacked


def read(source: Source, root: Path) -> Iterator[str]:
    """The documents of a source, in the order of its files."""
    for path in sorted(root.glob(source.files)):
        if path.is_file():
            data = path.read_bytes()
            if data[:2] == b"\x1f\x8b":
                data = gzip.decompress(data)
            if b"\0" not in data[:4096]:
                yield from documents(source.kind, data.decode("utf-8", errors="replace"))


def build(folder: Path, target: Path, seed: int = 0) -> dict[str, int]:
    """Write all documents to `target` (JSONL, zstd): {"text", "source", "split"}. Returns bytes of text by source."""
    found: dict[bytes, tuple[str, str]] = {}
    for source in sources():
        for text in read(source, fetch(source, folder)):
            found.setdefault(hashlib.blake2b(text.encode(), digest_size=16).digest(), (text, source.package))
    texts = list(found.values())
    random.Random(seed).shuffle(texts)
    sizes: dict[str, int] = {}
    temporary = target.with_suffix(".part")
    with zstandard.open(temporary, "wt", encoding="utf-8") as lines:
        for number, (text, package) in enumerate(texts):
            sizes[package] = sizes.get(package, 0) + len(text.encode())
            split = "heldout" if number % HELD_OUT == 0 else "train"
            lines.write(json.dumps({"text": text, "source": package, "split": split}, ensure_ascii=False) + "\n")
    temporary.rename(target)
    return sizes


def stored(path: Path, split: str) -> Iterator[str]:
    """The documents of a split, from what `build` wrote. Raises DataError where it is missing."""
    if not path.exists():
        raise DataError(f"{path} is missing: `python -m experiments base` makes it in its work folder")
    with zstandard.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            if document["split"] == split:
                yield document["text"]
