"""Which base model an adapter was trained on: a digest of its weights, kept in the metadata of the adapter's file.

PEFT reads past the metadata. An adapter of another tool has none; there the base model's name is all that is known
(`folder.other_base_note`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.errors import ModelError

if TYPE_CHECKING:
    from fedloom.adapters.folder import AdapterFolder

KEY = "fedloom_base"
"""The key in the metadata."""
SAMPLE = 2**16
"""Bytes read of each tensor. Training changes all of a weight, and to read all of a large model takes minutes."""
MOST_HEADER = 100 * 2**20
"""Bytes of a header; what safetensors itself allows."""


def digest_weights(folder: Path) -> str:
    """32 hex digits for a base model's tensors: names, types, shapes and the first bytes of each, however many files
    they are in. Empty where the folder has no safetensors files that can be read.
    """
    parts: dict[str, bytes] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            parts |= _samples(file)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""  # whoever loads the model says what is wrong with it
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(parts):
        hasher.update(f"{name}\0".encode() + parts[name])
    return hasher.hexdigest() if parts else ""


def _samples(file: Path) -> dict[str, bytes]:
    """Tensor → digest of its type, shape and first bytes."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length)) if length <= MOST_HEADER else {}
        found = {}
        for name, told in header.items():
            if name == "__metadata__":
                continue
            start, end = told["data_offsets"]
            opened.seek(8 + length + start)
            form = f"{told['dtype']} {told['shape']}\0".encode()
            found[name] = hashlib.blake2b(form + opened.read(min(end - start, SAMPLE)), digest_size=16).digest()
    return found


def metadata_of(digest: str) -> dict[str, str]:
    """What an adapter's file says of its base."""
    return {KEY: digest} if digest else {}


def read_digest(metadata: dict[str, str] | None) -> str:
    """The digest in a file's metadata, or nothing: a stranger may have written anything there."""
    found = (metadata or {}).get(KEY, "")
    return found if re.fullmatch("[0-9a-f]{32}", found) else ""


def common_digest(adapters: Iterable[AdapterFolder]) -> str:
    """The digest of the base that all adapters were trained on; empty unless all have one, and the same."""
    found = {adapter.base_digest for adapter in adapters}
    return found.pop() if len(found) == 1 else ""


def check_one_base(adapters: Iterable[AdapterFolder], leave: str) -> None:
    """Raises ModelError where two adapters were trained on base models of other weights. leave: how to allow that."""
    first: AdapterFolder | None = None
    for adapter in adapters:
        if not adapter.base_digest:
            continue
        first = first or adapter
        if adapter.base_digest != first.base_digest:
            raise ModelError(
                f"{first.folder} and {adapter.folder} were trained on base models of different weights "
                f"({first.base_model} and {adapter.base_model}): together they are worthless; {leave} goes on anyway"
            )


def check_same_base(adapters: Iterable[AdapterFolder], here: str, name: str, leave: str) -> None:
    """Raises ModelError where an adapter was trained on a base model of other weights than those of digest `here`.

    name: what the user calls that base; leave: how to go on nevertheless.
    """
    for adapter in adapters:
        if here and adapter.base_digest and adapter.base_digest != here:
            raise ModelError(
                f"{adapter.folder} was trained on other weights than those of {name} (digest "
                f"{adapter.base_digest[:8]}, here {here[:8]}): give the base model that it names, "
                f"{adapter.base_model}; {leave} goes on with this one, such as the same model in another type"
            )
