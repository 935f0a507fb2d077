"""What this machine can do, measured: rates of arithmetic and memory, and the peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedloom.errors import ConfigError

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MMAP_THRESHOLD = -3  # glibc's name for it
_now = time.perf_counter


@dataclass(frozen=True, slots=True)
class Rates:
    """Operations a second of square matrix products by type, and bytes a second of a copy (read and written)."""

    float32: float
    float64: float
    bytes: float


def check_device(device: str) -> None:
    """Raise ConfigError unless this machine can compute on "cpu", "cuda" or "cuda:<number>", whichever `device` is."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise ConfigError(f"device is {device!r}: expected cpu, cuda or cuda:<number>")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {device!r}, but torch finds {torch.cuda.device_count()} CUDA devices: use cpu")


def measure_rates(device: str = "cpu", repeats: int = 3) -> Rates:
    """The best of several trials with all threads that torch may use."""
    size = 1024
    flops = {}
    for dtype in (torch.float32, torch.float64):
        matrix = torch.rand(size, size, dtype=dtype, device=device)
        out = torch.empty_like(matrix)
        flops[dtype] = 2 * size**3 / best_seconds(lambda m=matrix, o=out: torch.mm(m, m, out=o), repeats)  # type: ignore[misc]
    source = torch.rand(2**24, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return Rates(
        flops[torch.float32], flops[torch.float64], moved / best_seconds(lambda: target.copy_(source), repeats)
    )


def median_rates(trials: Sequence[Rates]) -> Rates:
    """The median of each rate."""
    return Rates(*(statistics.median(column) for column in zip(*map(astuple, trials), strict=True)))


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several calls, after one to warm up."""
    call()
    return min(time_call(call) for _ in range(repeats))


@contextmanager
def processor_time() -> Iterator[None]:
    """Measure seconds of processor time, the sum over threads, for machines that others use as well."""
    global _now
    _now = time.process_time
    try:
        yield
    finally:
        _now = time.perf_counter


def time_call(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call (see `processor_time`), until the GPU has finished where one was used."""
    start = _now()
    call()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return _now() - start


def extra_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Peak memory of a call above what was held before, its result and the libraries' workspace included.

    On a GPU what torch allocated. On Linux the peak of the resident set, after free memory was handed back to the
    system, with large blocks in mappings of their own from now on, so that what malloc keeps for later does not count;
    None elsewhere. Call once before to have code loaded and workspaces of the libraries in place.
    """
    if device != "cpu":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - held
    if not os.access(_CLEAR, os.W_OK):
        return None
    gc.collect()
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and libc.mallopt(_MMAP_THRESHOLD, 2**16)):
        return None
    libc.malloc_trim(0)
    _CLEAR.write_text("5")  # resets the peak
    held = _status("VmRSS")
    call()
    return max(_status("VmHWM") - held, 0)


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that torch's operations make, until each is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address and address not in self._known:
            self._known.add(address)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, address, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def tensor_bytes(call: Callable[[], object]) -> int:
    """Peak bytes of the tensors that a call makes; the same on every machine, and without the libraries' workspace."""
    with _LiveTensors() as counter:
        call()
    peak: int = counter.peak
    return peak


def describe_machine(measured: Rates, device: str = "cpu") -> dict[str, object]:
    """The machine as the JSON of a benchmark names it."""
    name = platform.machine() if device == "cpu" else torch.cuda.get_device_name(device)
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, **asdict(measured)}


def _status(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
