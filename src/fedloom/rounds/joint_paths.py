"""A whole adapter as paths through trellises (`compress.paths`): one tensor, and no name or shape travels.

    "paths:<q>"     dense, one bit each: −1 for 0 and 1 for 1; first the rates and scales of the adapter's components
    "paths:B:<q>"   the same of B alone, where A rests

q is the largest rank of the sender, as in `joint`; components are rows of A and columns of B, over the tensors of the
adapter in order of name.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fedloom.compress.entries import Dense, Quantized
from fedloom.compress.paths import Paths, Traced
from fedloom.errors import WireError
from fedloom.methods.method import Entries
from fedloom.rounds.joint_drawn import check_unscaled

PATHS = "paths:"
_ONLY_B = "B:"

Shapes = Mapping[str, tuple[int, ...]]

_ALL = 65536


def join_paths(entries: Entries, shapes: Shapes, rank: int) -> Entries | None:
    """The one tensor, where the entries are what one set of paths says of all of these tensors, or of B; else None."""
    b = _of_b(shapes)
    only_b = entries.keys() == b.keys()
    shapes = b if only_b else shapes
    held = [entry for entry in entries.values() if isinstance(entry, Traced)]
    if not held or len(held) < len(entries) or {name: entry.shape for name, entry in entries.items()} != shapes:
        return None
    paths = held[0].paths
    if any(entry.paths is not paths for entry in held):
        return None
    codes = torch.from_numpy(2 * paths.coded(shapes).astype(np.int8) - 1)
    said = Quantized(codes, torch.ones(-(-codes.numel() // _ALL)), _ALL, 1)
    return {f"{PATHS}{_ONLY_B if only_b else ''}{rank}": Dense((codes.numel(),), said)}


def _of_b(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name.endswith("/B")}


def named_rank(named: str) -> str:
    """The rank in the name of such a tensor, as it stands there."""
    return named.removeprefix(PATHS).removeprefix(_ONLY_B)


def split_paths(entries: Entries, named: str, shapes: Shapes) -> dict[str, Dense]:
    """What `join_paths` was given, as dense float32. Raises WireError where the tensor does not fit these shapes."""
    if len(entries) != 1:
        raise WireError(f"{named!r} stands for the whole adapter, and the payload holds other tensors beside it")
    if named.startswith(PATHS + _ONLY_B):
        shapes = _of_b(shapes)
    entry = entries[named]
    if not isinstance(entry, Dense):
        raise WireError(f"{named!r} is not dense")
    check_unscaled(named, entry.values, 1)
    assert isinstance(entry.values, Quantized)
    paths = Paths.decoded((entry.values.codes.numpy() > 0).astype(np.uint8), shapes)
    return {name: Dense(shapes[name], tensor.flatten()) for name, tensor in paths.tensors(shapes).items()}
