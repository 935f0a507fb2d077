"""A base model's folder: where each tensor lies, and its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedloom.adapters.json_file import read_json
from fedloom.adapters.tensor_file import DTYPES
from fedloom.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class BaseFolder:
    """A base model's folder: where each tensor lies, and its config.json."""

    folder: Path
    shards: Mapping[str, tuple[str, ...]]
    config: Mapping[str, Any]

    def names(self) -> set[str]:
        """Of all tensors."""
        return {name for names in self.shards.values() for name in names}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, read from the headers."""
        found: dict[str, tuple[int, ...]] = {}
        for shard, names in self.shards.items():
            with safe_open(self.folder / shard, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        return found

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens, if the config names it."""
        text = self.config.get("text_config")
        sizes = [part.get("vocab_size") for part in (self.config, text) if isinstance(part, dict)]
        return next((size for size in sizes if isinstance(size, int)), None)

    def tensor(self, shard: str, name: str) -> Tensor:
        """One tensor. The file is opened anew each time, since what was read stays in memory while it is open."""
        with safe_open(self.folder / shard, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def open_base(folder: Path) -> BaseFolder:
    """The base model in a folder of transformers'. Raises ModelError where its weights cannot be changed."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"--base-model {folder} holds no config.json: expected a folder with a model of transformers")
    config = read_json(path)
    files = _shards(folder / INDEX) if (folder / INDEX).is_file() else [SINGLE]
    if config.get("quantization_config"):
        raise ModelError(f"--base-model {folder} is quantised, and cannot take up a change: give the full model")
    return BaseFolder(folder, {name: _contents(folder, name) for name in files}, config)


def _shards(index: Path) -> list[str]:
    """Names of the files that an index of weights lists."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ModelError(f"{index} is not valid: expected weight_map, the names of tensors and their files")
    return sorted(set(placed.values()))


def _contents(folder: Path, shard: str) -> tuple[str, ...]:
    """Names of a file's tensors, wider types first, so that every tensor is aligned."""
    if Path(shard).name != shard or not (folder / shard).is_file():
        raise ModelError(f"--base-model {folder} lacks {ascii(shard)[1:-1]}: expected its weights as safetensors")
    try:
        with safe_open(folder / shard, framework="pt") as file:
            types = {name: file.get_slice(name).get_dtype() for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / shard} cannot be read: {ascii(str(error))[1:-1][:300]}") from None
    widths = {name: dtype.itemsize for dtype, name in DTYPES.items()}
    for name, told in types.items():
        if told not in widths:
            raise ModelError(f"{folder / shard}: {name} is of type {told}, which is not supported")
    return tuple(sorted(types, key=lambda name: (-widths[types[name]], name)))
