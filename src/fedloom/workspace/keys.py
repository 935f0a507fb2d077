"""Names of tensors and payloads by their content.

Tensors of a state are computed here, and are named by a quick hash: as fast as memory is, so nothing is remembered of
them. Payloads come from others, who may choose their bytes: no two of them can be made that have one name.
"""

from __future__ import annotations

import hashlib

import torch
import xxhash
from torch import Tensor

_QUICK = "xxh3-"
"""Before the hash of a state's tensor. Keys without it are blake2b's: of payloads, and of all before format 5."""


class PayloadKeys:
    """The keys of payloads that were hashed already, under names whose payload is always the same."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], str] = {}

    def of(self, name: str, payload: Tensor) -> str:
        """The key of a payload that is always the same under this name, such as the broadcast of a version."""
        found = self._held.get((name, payload.numel()))
        if found is None:
            found = self._held[name, payload.numel()] = payload_key(payload)
        return found

    def forget(self, names: frozenset[str]) -> None:
        """Keep the keys of payloads of these names only."""
        self._held = {of: key for of, key in self._held.items() if of[0] in names}


def tensor_key(tensor: Tensor) -> str:
    """A name that tensors of a state share by chance alone if content, shape or type differ."""
    hasher = xxhash.xxh3_128(_form_of(tensor))
    hasher.update(_bytes_of(tensor))
    return _QUICK + hasher.hexdigest()


def payload_key(payload: Tensor) -> str:
    """A name that only these bytes have, whoever chose them."""
    hasher = hashlib.blake2b(_form_of(payload), digest_size=16)
    hasher.update(_bytes_of(payload))
    return hasher.hexdigest()


def fits_key(tensor: Tensor, key: str) -> bool:
    """Whether a tensor read from a checkpoint is the one that was stored under this key."""
    return key == (tensor_key(tensor) if key.startswith(_QUICK) else payload_key(tensor))


def _form_of(tensor: Tensor) -> bytes:
    return f"{tuple(tensor.shape)}{tensor.dtype}".encode()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    # One without elements may have a stride of 0, which has no bytes in torch's eyes.
    return (flat.view(torch.uint8) if flat.numel() else torch.zeros(0, dtype=torch.uint8)).numpy().data
