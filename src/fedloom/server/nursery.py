"""The process that the workers of a run come from: it has loaded the libraries and, on a CPU, model and data, once.

    pool.Pool (the run's process) ─pipe→ nursery ─fork→ worker ⇄ pool.Pool

A worker shares the nursery's memory until it writes to it. The nursery computes nothing on more than one thread and
never touches a GPU, so that what it forks is sound. It ends with the run's process, whichever way that ends, and ends
all its workers.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import NoReturn

import torch

from fedloom.methods.method import Method
from fedloom.records.config import Config
from fedloom.server.pipes import pack, receive, send
from fedloom.server.tasks import Task
from fedloom.workspace.assemble import Setup, load_setup


@dataclass(frozen=True, eq=False, slots=True)
class Order:
    """What all workers of a run have in common. threads: of torch, in each; shared: whether they are on the CPU."""

    config: Config
    method: Method | None
    threads: int
    shared: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """What a task raised."""

    error: Exception


def tend(descriptor: int) -> None:
    """Fork workers as the other end of the pipe asks, until that is gone."""
    pipe, workers = Connection(descriptor), set[int]()
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    try:
        sys.path[:] = pipe.recv()  # as the run's process has it: a method or a metric may be anywhere
        order: Order = receive(pipe)
        load = _already(order) if order.shared else cache(lambda: load_setup(order.config, order.method))
        gc.collect()
        gc.freeze()  # looking for garbage would write to, and so copy, the memory that workers share
        while True:
            command, value = pipe.recv()
            if command == "fork":
                number = _fork(pipe, load, order.threads, value)
                workers.add(number)
                pipe.send(number)
            else:
                workers.remove(value)
                pipe.send(os.waitstatus_to_exitcode(os.waitpid(value, 0)[1]))
    except (EOFError, OSError):
        for number in workers:  # whatever they are doing
            os.kill(number, signal.SIGKILL)
        for number in workers:  # so that the seconds of CPU that they took are known to the run's process
            os.waitpid(number, 0)


def _already(order: Order) -> Callable[[], Setup]:
    """The set-up, loaded here; whoever asks for it is told why it could not be."""
    one = order.config.model.model_copy(update={"threads": 1})
    try:
        setup = load_setup(order.config.model_copy(update={"model": one}), order.method)
    except Exception as error:
        fault = error

        def refuse() -> Setup:
            raise fault

        return refuse
    return lambda: setup


def _fork(pipe: Connection, load: Callable[[], Setup], threads: int, device: str) -> int:
    """Fork a worker on the pipe whose end comes next; returns its number."""
    own = recv_handle(pipe)
    number = os.fork()
    if number:
        os.close(own)
        return number
    try:
        pipe.close()
        _work(Connection(own), load, threads, device)
    except (EOFError, OSError):
        os._exit(0)  # the run is over
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _work(pipe: Connection, load: Callable[[], Setup], threads: int, device: str) -> NoReturn:
    """Do one task after another."""
    if device != "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(threads)
    while True:
        task: Task = receive(pipe)
        send(pipe, pack(_answer(task, load)))


def _answer(task: Task, load: Callable[[], Setup]) -> object:
    try:
        return task.do(load())
    except Exception as error:
        return Failure(_told(error))


def _told(error: Exception) -> Exception:
    """The error as another process can take it, with the way that it came."""
    way = "".join(traceback.format_exception(error))
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # its class wants other arguments than its text
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(f"in a worker:\n{way}")
    return copy
