"""Which base model it is: a digest of all files that make it. Nothing here loads torch."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path

from fedloom.adapters.base_identity import digest_weights
from fedloom.errors import ModelError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
SHARED = (
    *WEIGHTS,
    *("config.json", "generation_config.json", "*.py"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"),
    *("chat_template*", "additional_chat_templates/*"),
)
"""The files of a model's folder that change what it computes, or how a text becomes tokens."""


def base_digest(path: str | Path) -> str:
    """32 hex digits for names and content of all that makes the model: weights, settings, tokenizer, templates, code.

    A Hub name stands for the files that were downloaded for it. Raises ModelError where there are none, or where one
    cannot be read.
    """
    folder = base_folder(path)
    names = {file.relative_to(folder).as_posix() for file in chain(*map(folder.glob, SHARED)) if file.is_file()}
    hasher = hashlib.blake2b(digest_size=16)
    try:
        for name in sorted(names):
            with (folder / name).open("rb") as content:
                hasher.update(f"{name}\0".encode() + hashlib.file_digest(content, "blake2b").digest())
    except OSError as error:
        raise ModelError(f"{folder / name} cannot be read: {error.strerror}") from None
    return hasher.hexdigest()


def weights_digest(path: str | Path) -> str:
    """`digest_weights` of a folder or Hub name; empty where nothing is there: no run shall fail for it at its end."""
    try:
        return digest_weights(base_folder(path))
    except ModelError:
        return ""


def base_folder(path: str | Path) -> Path:
    """The folder itself, or that of the Hub's cache for a Hub name; nothing is downloaded."""
    if Path(path).is_dir():
        return Path(path)
    from transformers.utils.hub import cached_file  # seconds of imports, which a folder does not need

    try:
        found = cached_file(str(path), "config.json", local_files_only=True)
    except (OSError, ValueError):  # no such name, or nothing of it in the cache
        found = None
    if found is None:
        raise ModelError(f"no base model at {path}: expected a Hugging Face folder, or a Hub name that was downloaded")
    return Path(found).parent
