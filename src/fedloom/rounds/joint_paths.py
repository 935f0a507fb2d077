"""A whole adapter as paths through trellises (`compress.paths`): two tensors, and no name or shape travels.

    "paths:<q>"     dense, one bit each: −1 for 0 and 1 for 1
    "components"    dense int8: the rate of every component, then the scale of every component

q is the largest rank of the sender, as in `joint`; components are rows of A and columns of B, over the tensors of the
adapter in order of name.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fedloom.compress.entries import Dense, Quantized
from fedloom.compress.paths import Paths, Traced, component_sizes
from fedloom.errors import WireError
from fedloom.methods.method import Entries
from fedloom.rounds.joint_drawn import check_unscaled

PATHS = "paths:"
COMPONENTS = "components"

Shapes = Mapping[str, tuple[int, ...]]

_ALL = 65536


def join_paths(entries: Entries, shapes: Shapes, rank: int) -> Entries | None:
    """The two tensors, where the entries are what one set of paths says of all of these tensors; else None."""
    held = [entry for entry in entries.values() if isinstance(entry, Traced)]
    if len(held) < len(entries) or any(entries[name].shape != shape for name, shape in shapes.items()):
        return None
    paths = held[0].paths
    if any(entry.paths is not paths for entry in held):
        return None
    bits = torch.from_numpy(2 * paths.bits.astype(np.int8) - 1)
    codes = torch.from_numpy(np.concatenate([paths.rates, paths.scales]))
    return {f"{PATHS}{rank}": _codes(bits, 1), COMPONENTS: _codes(codes, 8)}


def _codes(codes: torch.Tensor, bits: int) -> Dense:
    return Dense((codes.numel(),), Quantized(codes, torch.ones(-(-codes.numel() // _ALL)), _ALL, bits))


def split_paths(entries: Entries, named: str, shapes: Shapes) -> dict[str, Dense]:
    """What `join_paths` was given, as dense float32. Raises WireError where the two tensors do not fit these shapes."""
    codes = entries.get(COMPONENTS)
    if len(entries) != 2 or codes is None:
        raise WireError(f"{named!r} comes with a tensor {COMPONENTS!r} and nothing else: found {', '.join(entries)}")
    for name, bits in ((named, 1), (COMPONENTS, 8)):
        if not isinstance(entries[name], Dense):
            raise WireError(f"{name!r} is not dense")
        check_unscaled(name, entries[name].values, bits)
    steps, said = entries[named].values, codes.values
    assert isinstance(steps, Quantized) and isinstance(said, Quantized)
    number = component_sizes(shapes).size
    if said.numel() != 2 * number:
        raise WireError(f"{COMPONENTS!r} has {said.numel()} values: expected 2 for each of {number} components")
    rates, scales = np.split(said.codes.numpy(), 2)
    paths = Paths(rates, scales, (steps.codes.numpy() > 0).astype(np.uint8))
    return {name: Dense(shapes[name], tensor.flatten()) for name, tensor in paths.tensors(shapes).items()}
