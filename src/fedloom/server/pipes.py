"""Values over a pipe between two processes of this machine. Tensors go as they lie in memory, behind the rest."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Parcel:
    """A value as it is sent: what pickle makes of it, and the memory of its tensors."""

    body: memoryview
    planes: Sequence[memoryview]


def pack(value: object) -> Parcel:
    """Raises what pickle raises for a value that cannot be told to another process."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    return Parcel(file.getbuffer(), [buffer.raw() for buffer in buffers])


def send(pipe: Connection, parcel: Parcel) -> None:
    """Raises OSError where nobody reads."""
    pipe.send([plane.nbytes for plane in parcel.planes])
    for part in (parcel.body, *parcel.planes):
        pipe.send_bytes(part)


def receive(pipe: Connection) -> Any:  # noqa: ANN401 (whatever was sent)
    """The next value. Raises EOFError, or another OSError, where the other end is gone."""
    sizes: list[int] = pipe.recv()
    body = pipe.recv_bytes()
    planes = [torch.empty(size, dtype=torch.uint8).numpy() for size in sizes]  # aligned as torch's own tensors are
    for plane in planes:
        pipe.recv_bytes_into(plane.data)
    return pickle.loads(body, buffers=planes)


class _Pickler(pickle.Pickler):
    """Torch's own way writes a small archive for every tensor."""

    def reducer_override(self, held: object) -> Any:  # noqa: ANN401 (pickle's own contract)
        if type(held) is not Tensor:
            return NotImplemented
        plane = held.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (held.dtype, tuple(held.shape), pickle.PickleBuffer(plane.data))


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], plane: Any) -> Tensor:  # noqa: ANN401 (a buffer)
    flat = torch.from_numpy(np.asarray(plane))
    return flat.view(dtype).reshape(shape) if len(flat) else torch.empty(shape, dtype=dtype)
