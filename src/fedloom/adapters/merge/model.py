"""An adapter folder into the weights of its base model, W0 + ΔW, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedloom.adapters.folder import AdapterFolder
from fedloom.adapters.merge.base import BaseFolder
from fedloom.adapters.merge.companions import copy_companions
from fedloom.adapters.merge.places import Change, find_places
from fedloom.adapters.tensor_file import TensorFile
from fedloom.errors import ModelError
from fedloom.lora.pair import LoraPair

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
                    tensor, squares = _changed(tensor, adapter, modules[name])
                    change, lost = change + squares[0], lost + squares[1]
                target.add(name, tensor)
        size += target.size
    rounding = (lost / change) ** 0.5 if change else 0.0
    return MergedModel(len(base.names()), len({*modules, *whole}), size, rounding, left_out)


def _changed(tensor: Tensor, adapter: AdapterFolder, changes: Sequence[Change]) -> tuple[Tensor, tuple[float, float]]:
    """The tensor with the changes of its matrices added, and the squared norms of them and of what rounding changed."""
    change = lost = 0.0
    if any(each.at is not None for each in changes):
        tensor = tensor.clone()  # what was read may be a view of the file
    for each in changes:
        pair = adapter.pair(each.module)
        if each.rows:
            pair = LoraPair(pair.A, pair.B[slice(*each.rows)])
        oriented = LoraPair(pair.B.T, pair.A.T) if each.transposed else pair
        if each.at is None:
            tensor, squares = _added(tensor, oriented)
        else:
            tensor[each.at], squares = _added(tensor[each.at], oriented)
        change, lost = change + squares[0], lost + squares[1]
    return tensor, (change, lost)


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
