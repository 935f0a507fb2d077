"""A safetensors file written one tensor at a time, so that no more than one is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Type → its name in a safetensors header."""
_ENTRY = 256
"""Bytes of a header that one tensor's type, shape and offsets take at most, its name aside."""


class TensorFile:
    """A context in which the tensors called `names` are added, each once and in that order.

    The format begins with a header that tells each tensor's type, shape and offsets. Room for it is left at the start
    and filled at the end; what remains of it is blank, as the format allows. Equal tensors give equal bytes.
    metadata: further words for the header.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.size = 0
        """Bytes of tensor data so far."""
        self._names = list(names)
        told = {"format": "pt", **(metadata or {})}
        self._header: dict[str, object] = {"__metadata__": told}
        room = len(json.dumps(self._names)) + len(json.dumps(metadata or {})) + _ENTRY * (len(self._names) + 1)
        self._room = -room % 8 + room

    def __enter__(self) -> TensorFile:
        self._file = self.path.open("wb")
        self._file.seek(8 + self._room)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor. Raises ValueError where another one was announced."""
        done = len(self._header) - 1
        if self._names[done : done + 1] != [name]:
            raise ValueError(f"{name} is not the tensor announced at place {done}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(data.data)
        span = [self.size, self.size + data.size]
        self._header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        self.size = span[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                return
            if len(self._header) - 1 != len(self._names):
                raise ValueError(f"{self.path} lacks {self._names[len(self._header) - 1]}")
            text = json.dumps(self._header, separators=(",", ":")).encode()
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
