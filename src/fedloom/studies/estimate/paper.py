"""The paper's format, really encoded: a bitmap of all parameters and float32 values (FedSRD, arXiv 2510.04601).

It is what `python -m benchmarks wire` compares with, and nothing else uses it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.compress.entries import Entry, Seeded, Sparse, count, floats
from fedloom.compress.masks import seeded_mask


def paper_encode(entries: Mapping[str, Entry]) -> bytes:
    """Per tensor: one bit an element (present or not), filled up to a byte, then the present values as float32."""
    pieces = []
    for entry in entries.values():
        pieces += [np.packbits(_present(entry)).tobytes(), floats(entry.values).numpy().tobytes()]
    return b"".join(pieces)


def paper_decode(payload: bytes, shapes_of: Mapping[str, tuple[int, ...]]) -> dict[str, Sparse]:
    """What `paper_encode` was given, as sparse entries; the shapes are not in its bytes."""
    entries, at = {}, 0
    for name, shape in shapes_of.items():
        numel = count(shape)
        packed = np.frombuffer(payload, np.uint8, (numel + 7) // 8, at)
        positions = np.flatnonzero(np.unpackbits(packed, count=numel))
        at += packed.size
        values = np.frombuffer(payload, np.float32, positions.size, at).copy()
        at += values.nbytes
        entries[name] = Sparse(shape, torch.from_numpy(positions), torch.from_numpy(values))
    return entries


def _present(entry: Entry) -> NDArray[np.bool_]:
    if isinstance(entry, Seeded):
        mask: NDArray[np.bool_] = seeded_mask(count(entry.shape), entry.density, entry.seed).numpy()
        return mask
    present = np.full(count(entry.shape), not isinstance(entry, Sparse))
    if isinstance(entry, Sparse):
        present[entry.positions.numpy()] = True
    return present
