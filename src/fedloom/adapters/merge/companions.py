"""The files of a base model beside its weights, copied by name: a folder of a stranger's may hold anything else."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from fedloom.errors import ModelError

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("chat_template.json", "chat_template.jinja"),
)
"""What makes a tokenizer and its chat template."""
COPIED = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *TOKENIZER,
    *("preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""What transformers reads beside weights, and what a licence asks to hand on. Code of auto_map is not among them."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".bin.index.json")
"""Ends of files that hold weights in other forms; that these are not copied needs no word."""


def copy_companions(folder: Path, out: Path, shards: Collection[str]) -> tuple[str, ...]:
    """Copy the files of a model folder that belong to it, and return the names of the others, sorted.

    Links are followed within the folder, and from a snapshot in the Hub's cache to its blobs. Raises ModelError for a
    link to elsewhere: what it leads to would be published with the model.
    """
    left_out = []
    for file in sorted(folder.iterdir()):
        if file.name in shards or file.name.endswith(WEIGHTS) or not file.is_file():
            continue
        if not any(fnmatchcase(file.name, known) for known in COPIED) or file.name.endswith(".py"):
            left_out.append(file.name if file.name.isprintable() else ascii(file.name))
            continue
        if not _belongs(file.resolve(), folder.resolve()):
            raise ModelError(
                f"{file} is a link to {file.resolve()}, outside the folder: put a copy in its place, or take it away"
            )
        shutil.copyfile(file, out / file.name)
    return tuple(left_out)


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the files of a model folder that make its tokenizer; a link to elsewhere is left out."""
    for name in TOKENIZER:
        if (folder / name).is_file() and _belongs((folder / name).resolve(), folder.resolve()):
            shutil.copyfile(folder / name, out / name)


def _belongs(target: Path, folder: Path) -> bool:
    """Whether a file is in the folder, or among the blobs of the Hub's cache that the folder is a snapshot of."""
    homes = [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]
    return any(target.is_relative_to(home) for home in homes)
