"""Modules side by side: one BLAS thread each, because a LoRA module is too small for BLAS to share out.

Threads share one interpreter. Each gives it up for every operation on a tensor and waits for it afterwards, which takes
longer than a small operation does: two threads are slower than one there (docs/benchmarks/rounds.md). So modules run
side by side where one of them is worth it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

WORTH = 1.5e8
"""Floating-point operations of a module from which threads pay."""
EIGEN = 20
"""n³ operations that the eigenvalues and eigenvectors of a symmetric n × n matrix take, about."""
_busy = threading.Lock()


def map_modules(function: Callable[[Item], Result], items: Iterable[Item], costs: Iterable[float] = ()) -> list[Result]:
    """[function(item) for item in items], computed by as many threads as torch may use, in the order of the items.

    costs: about how many floating-point operations each call takes; below a mean of WORTH, or where they are left out,
    one thread computes all.
    Every call runs on one thread with one BLAS thread, so results do not depend on how many there are. An exception
    is that of the first item that raised one. Nested and concurrent calls run in the calling thread.
    """
    work, costs = list(items), list(costs)
    worth = bool(costs) and sum(costs) >= WORTH * len(costs)
    threads = torch.get_num_threads()
    if not _busy.acquire(blocking=False):
        return [function(item) for item in work]
    try:
        torch.set_num_threads(1)
        if threads == 1 or len(work) < 2 or not worth:
            return [function(item) for item in work]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, work))
    finally:
        torch.set_num_threads(threads)
        _busy.release()
