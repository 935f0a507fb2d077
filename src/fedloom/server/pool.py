"""The workers of a run: processes that each do one task at a time. Results come in the order of the tasks.

What a task gives depends on the task alone, so neither how many workers there are nor which of them does it matters. A
worker that is killed, for lack of memory say, costs its task's time: another one does the task anew, once.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from fedloom.errors import ConfigError, RoundError
from fedloom.server.nursery import Failure, Order
from fedloom.server.nursery_process import Nursery
from fedloom.server.pipes import pack, receive, send
from fedloom.server.tasks import Task

Work = TypeVar("Work", bound=Task)

TRIES = 2
"""How often a task is done whose worker is killed. What kills two would kill the third."""
AHEAD = 4
"""Tasks for each worker that may be begun or done before the first of them is taken: what waits is in memory."""


@dataclass(eq=False, slots=True)
class Worker:
    """A process, the pipe to it, and where it works."""

    number: int
    pipe: Connection
    device: str


@dataclass(eq=False, slots=True)
class Ticket(Generic[Work]):
    """A task that has been given out, and what came of it once it is over."""

    task: Work
    tries: int = 0
    over: bool = False
    found: Any = None

    def result(self) -> Any:  # noqa: ANN401 (the task's own)
        """What the task gave. Raises what it raised."""
        if isinstance(self.found, Failure):
            raise self.found.error
        return self.found

    def close(self, found: object) -> None:
        """The task is over."""
        self.over, self.found = True, found


class Pool:
    """Up to `count` workers, forked as they are needed, on the devices in turn.

    Raises ConfigError where the order's method cannot be told to another process.
    """

    def __init__(self, nursery: Nursery, order: Order, count: int, devices: Sequence[str]) -> None:
        self._nursery, self._count, self._devices = nursery, count, tuple(devices)
        self._idle: list[Worker] = []
        self._busy: dict[Connection, tuple[Worker, Ticket[Any]]] = {}
        self._begun = 0
        try:
            told = pack(order)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"local.workers is {count}, but the method that was handed over cannot be told to another process "
                f"({error}): name it, as package.module:builder, or leave local.workers out"
            ) from None
        with suppress(OSError):  # what is wrong shows when a worker is forked
            send(nursery.pipe, told)

    def run(self, tasks: Iterable[Work], begun: Callable[[Work], None] = lambda task: None) -> Iterator[Ticket[Work]]:
        """The tasks' tickets in their order, each once it is over. Tasks are drawn as workers become free.

        begun: called as a task is given out. Raises RoundError where no worker can be had.
        """
        source: Iterator[Work] = iter(tasks)
        line: deque[Ticket[Work]] = deque()
        task = next(source, None)
        while task is not None or line:
            while task is not None and len(line) < AHEAD * self._count and len(self._busy) < self._count:
                line.append(Ticket(task))
                begun(task)
                self._hand_out(line[-1], self._idle.pop() if self._idle else self._begin())
                task = next(source, None)
            if line and line[0].over:
                yield line.popleft()
            else:
                self._listen()

    def _hand_out(self, ticket: Ticket[Any], worker: Worker) -> None:
        """Give a task to a worker that is free."""
        self._busy[worker.pipe] = worker, ticket
        try:
            send(worker.pipe, pack(ticket.task))
        except OSError:
            self._replace(worker, ticket)

    def _listen(self) -> None:
        """Wait for results, and take them."""
        for pipe in wait(list(self._busy)):
            assert isinstance(pipe, Connection)
            worker, ticket = self._busy[pipe]
            try:
                found = receive(pipe)
            except (EOFError, OSError):
                self._replace(worker, ticket)
            else:
                ticket.close(found)
                self._idle.append(worker)
                del self._busy[pipe]

    def _replace(self, worker: Worker, ticket: Ticket[Any]) -> None:
        """A worker has ended amid its task: have another one do it."""
        del self._busy[worker.pipe]
        worker.pipe.close()
        ended = self._nursery.bury(worker.number)
        ticket.tries += 1
        if ticket.tries < TRIES:
            self._hand_out(ticket, self._fork(worker.device))
            return
        self._idle.append(self._fork(worker.device))
        ticket.close(
            Failure(
                RoundError(
                    f"{ticket.task.describe()}: the process that worked on it was ended {TRIES} times, the last time "
                    f"{ended}; fewer local.workers take less memory, and the run goes on with --resume"
                )
            )
        )

    def _begin(self) -> Worker:
        self._begun += 1
        return self._fork(self._devices[(self._begun - 1) % len(self._devices)])

    def _fork(self, device: str) -> Worker:
        number, pipe = self._nursery.fork(device)
        return Worker(number, pipe, device)
