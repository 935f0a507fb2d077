"""What this machine can do, measured: rates of arithmetic and memory, and the peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch

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


def check(device: str) -> None:
    """Raise ConfigError unless this machine can compute on "cpu", "cuda" or "cuda:<number>", whichever `device` is."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise ConfigError(f"device is {device!r}: expected cpu, cuda or cuda:<number>")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {device!r}, but torch finds {torch.cuda.device_count()} CUDA devices: use cpu")


def rates(device: str = "cpu", repeats: int = 3) -> Rates:
    """The best of several trials with all threads that torch may use."""
    size = 1024
    flops = {}
    for dtype in (torch.float32, torch.float64):
        matrix = torch.rand(size, size, dtype=dtype, device=device)
        out = torch.empty_like(matrix)
        flops[dtype] = 2 * size**3 / best(lambda m=matrix, o=out: torch.mm(m, m, out=o), repeats)  # type: ignore[misc]
    source = torch.rand(2**24, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return Rates(flops[torch.float32], flops[torch.float64], moved / best(lambda: target.copy_(source), repeats))


def median(trials: Sequence[Rates]) -> Rates:
    """The median of each rate."""
    return Rates(*(statistics.median(column) for column in zip(*map(astuple, trials), strict=True)))


def best(call: Callable[[], object], repeats: int) -> float:
    """The least seconds of several calls, after one to warm up."""
    call()
    return min(seconds(call) for _ in range(repeats))


@contextmanager
def processor_time() -> Iterator[None]:
    """Measure seconds of processor time, the sum over threads, for machines that others use as well."""
    global _now
    _now = time.process_time
    try:
        yield
    finally:
        _now = time.perf_counter


def seconds(call: Callable[[], object]) -> float:
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


def description(measured: Rates, device: str = "cpu") -> dict[str, object]:
    """The machine as the JSON of a benchmark names it."""
    name = platform.machine() if device == "cpu" else torch.cuda.get_device_name(device)
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, **asdict(measured)}


def _status(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
