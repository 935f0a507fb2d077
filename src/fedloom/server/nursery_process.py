"""The run's end of the process that its workers come from. It loads no torch: that process is begun before this one has
loaded what both need.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from types import TracebackType
from typing import Self

from fedloom.errors import RoundError
from fedloom.records.config import Config

PATIENCE = 10.0
"""Seconds that the process may take to end its workers."""
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",  # its threads do not survive a fork
    "HF_DEACTIVATE_ASYNC_LOAD": "1",  # nor do those that transformers loads weights with
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # or a look whether there is a GPU leaves none to what is forked
}
PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
"""For more threads than CPUs: a thread that waits leaves its CPU to the others."""


class Nursery:
    """The process, to be used as a context manager. crowded: whether its workers have more threads than there are CPUs.

    pipe: on it the process is first told sys.path, then the order (see `nursery.tend`).
    """

    def __init__(self, *, crowded: bool) -> None:
        self.pipe, far = Pipe()
        self._forked = False
        quiet = "from fedloom.garbage import collect_rarely; collect_rarely()"
        code = f"{quiet}; from fedloom.server.nursery import tend; tend({far.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[far.fileno()],
            env={**os.environ, **QUIET, **(PASSIVE if crowded else {})},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C on the terminal is for the run's process, which ends this group as a whole
        )
        far.close()
        self.pipe.send(sys.path)

    def fork(self, device: str) -> tuple[int, Connection]:
        """A new worker: its number, and the pipe to it. Raises RoundError where the process has ended."""
        near, far = Pipe()
        with far, suppress(OSError):  # what is wrong shows in the answer
            self.pipe.send(("fork", device))
            send_handle(self.pipe, far.fileno(), self._process.pid)
        self._forked = True
        return self._answer(), near

    def bury(self, number: int) -> str:
        """How a worker has ended, in words."""
        with suppress(OSError):  # what is wrong shows in the answer
            self.pipe.send(("bury", number))
        return describe_end(self._answer())

    def _answer(self) -> int:
        try:
            answer: int = self.pipe.recv()
        except (EOFError, OSError):
            raise RoundError(
                f"the process that the run's workers come from was ended {describe_end(self._process.wait())}: go on "
                "with --resume"
            ) from None
        return answer

    def close(self) -> None:
        """End the process and all workers, whatever they are doing."""
        self.pipe.close()
        if self._forked:  # else it may still be loading, and would not notice
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def begin_nursery(config: Config) -> Iterator[Nursery | None]:
    """The process, where [local] asks for workers."""
    count, cpus = config.local.count, os.cpu_count() or 1
    if not count:
        yield None
        return
    with Nursery(crowded=count * (config.model.threads or cpus) > cpus) as nursery:
        yield nursery


def describe_end(code: int) -> str:
    """How a process ended, in words; `code` as subprocess has it: minus the signal, or what it said itself."""
    if code == -signal.SIGKILL:
        return "by the signal SIGKILL, as a system does that is out of memory"
    return f"by the signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
