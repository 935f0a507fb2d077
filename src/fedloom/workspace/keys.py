"""Names of tensors by their content, computed again only for what has changed since the last checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor as it was when it was hashed: torch's count of changes in place, its place, and a quick hash of it."""

    changes: int
    place: int
    quick: int


class ContentKeys:
    """The keys of tensors and payloads that were hashed already, as long as they live.

    A state's tensors are replaced, never written into. Should one be changed in place all the same, three things tell:
    torch counts such changes, a tensor may lie elsewhere, and a quick hash is taken anew, about as fast as memory is.
    """

    def __init__(self) -> None:
        self._tensors: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._payloads: dict[tuple[str, int], str] = {}

    def of(self, tensor: Tensor) -> str:
        """The key of a tensor's content, shape and type."""
        if tensor.is_inference():  # torch counts no changes there
            return content_key(tensor)
        now = Seen(tensor._version, tensor.data_ptr(), xxhash.xxh3_128_intdigest(_bytes_of(tensor).numpy().data))
        seen, key = self._tensors[tensor] if tensor in self._tensors else (None, "")  # noqa: SIM401 (`get` has no types)
        if seen != now:
            key = content_key(tensor)
            self._tensors[tensor] = now, key
        return key

    def of_payload(self, name: str, payload: Tensor) -> str:
        """The key of a payload that is always the same under this name, such as the broadcast of a version."""
        found = self._payloads.get((name, payload.numel()))
        if found is None:
            found = self._payloads[name, payload.numel()] = content_key(payload)
        return found

    def forget_payloads(self, names: frozenset[str]) -> None:
        """Keep the keys of payloads of these names only."""
        self._payloads = {of: key for of, key in self._payloads.items() if of[0] in names}


def content_key(tensor: Tensor) -> str:
    """A name that only this content, shape and type have."""
    hasher = hashlib.blake2b(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=16)
    hasher.update(_bytes_of(tensor).numpy().data)
    return hasher.hexdigest()


def _bytes_of(tensor: Tensor) -> Tensor:
    flat = tensor.detach().cpu().contiguous().view(-1)
    # One without elements may have a stride of 0, which has no bytes in torch's eyes.
    return flat.view(torch.uint8) if flat.numel() else torch.zeros(0, dtype=torch.uint8)
