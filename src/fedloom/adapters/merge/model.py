"""An adapter folder into the weights of its base model, W0 + ΔW, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedloom.adapters.folder import AdapterFolder
from fedloom.adapters.json_file import read_json
from fedloom.adapters.merge.companions import copy_companions
from fedloom.adapters.settings import PREFIX
from fedloom.adapters.tensor_file import DTYPES, TensorFile
from fedloom.errors import ModelError
from fedloom.lora.pair import LoraPair

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class MergedModel:
    """What was written: tensors in all and those changed, bytes of weights, and ‖rounding‖_F / ‖ΔW‖_F.

    The base's own type is kept, and may be too coarse for a small change. left_out: names of the base's other files
    that were not copied.
    """

    tensors: int
    changed: int
    bytes: int
    rounding: float
    left_out: tuple[str, ...] = ()


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


def merge_into(base: BaseFolder, adapter: AdapterFolder, out: Path) -> MergedModel:
    """Write the base with the adapter merged into it, under the same file names, and its configuration and tokenizer.

    Raises ModelError where a module or whole tensor of the adapter has no weight of its own in the base, or a file of
    the base leads out of its folder.
    """
    modules, whole = find_places(base, adapter)
    left_out = copy_companions(base.folder, out, {*base.shards})
    size, lost, change = 0, 0.0, 0.0
    for shard, names in base.shards.items():
        with TensorFile(out / shard, names) as target:
            for name in names:
                tensor = base.tensor(shard, name)
                if name in whole:
                    tensor = adapter.tensor(whole[name]).to(tensor.dtype)
                if name in modules:
                    tensor, squares = _added(tensor, _oriented(adapter, modules[name]))
                    change, lost = change + squares[0], lost + squares[1]
                target.add(name, tensor)
        size += target.size
    rounding = (lost / change) ** 0.5 if change else 0.0
    return MergedModel(len(base.names()), len({*modules, *whole}), size, rounding, left_out)


def find_places(base: BaseFolder, adapter: AdapterFolder) -> tuple[dict[str, str], dict[str, str]]:
    """Name of a weight in the base → the adapter's module; and → the adapter's whole tensor that replaces it.

    Raises ModelError where one of them has no place in the base, another shape, or a second use there.
    """
    modules = {_place(base, f"{module}.weight"): module for module in adapter.modules}
    whole = {_place(base, name.removeprefix(PREFIX).replace(".base_layer.", ".")): name for name in adapter.whole}
    expected = {name: _weight_shape(adapter, module) for name, module in modules.items()}
    expected |= {name: adapter.whole[own] for name, own in whole.items()}
    shapes = base.shapes()
    vocabulary = [name for name, shape in shapes.items() if shape[:1] == (base.vocab_size,)]
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ModelError(
                f"{name} has shape {shapes[name]} in {base.folder}, and {shape} in the adapters: their base is another"
            )
        if vocabulary == [name]:
            raise ModelError(f"{name} is also the output layer of {base.folder}, which the adapters do not change")
    return modules, whole


def _place(base: BaseFolder, name: str) -> str:
    """The tensor's name in the base, which is shorter where it was saved without its language-model head."""
    names = base.names()
    fits = [name] if name in names else [known for known in names if name.endswith(f".{known}")]
    if len(fits) != 1:
        raise ModelError(
            f"{base.folder} holds no tensor {name}, which the adapters change: their base is another, or the weight is "
            "shared with another module's or stored in another form there"
        )
    return fits[0]


def _weight_shape(adapter: AdapterFolder, module: str) -> tuple[int, ...]:
    layout = adapter.layouts[module]
    straight = (layout.outputs, *layout.inputs)
    return straight[::-1] if _transposed(adapter, module) else straight


def _transposed(adapter: AdapterFolder, module: str) -> bool:
    layout = adapter.layouts[module]
    return layout.embedding or adapter.settings.fan_in_fan_out and len(layout.inputs) == 1


def _oriented(adapter: AdapterFolder, module: str) -> LoraPair:
    """The pair whose product is ΔW as the base stores that weight."""
    pair = adapter.pair(module)
    return LoraPair(pair.B.T, pair.A.T) if _transposed(adapter, module) else pair


def _added(weight: Tensor, pair: LoraPair) -> tuple[Tensor, tuple[float, float]]:
    """W + B A in W's type, some rows at a time, and the squared norms of B A and of what rounding changed."""
    if not weight.is_floating_point() or weight.itemsize < 2:
        raise ModelError(f"a weight of type {weight.dtype} cannot take up a change: give the model in bf16 or wider")
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows, sums = out.view(weight.shape[0], -1), weight.reshape(weight.shape[0], -1)
    change = lost = 0.0
    for first in range(0, rows.shape[0], _ROWS):
        part = slice(first, first + _ROWS)
        delta = pair.B[part].double() @ pair.A.double()
        ideal = sums[part].double() + delta
        rows[part] = ideal.to(weight.dtype)
        change += float(delta.square().sum())
        lost += float((rows[part].double() - ideal).square().sum())
    return out, (change, lost)
