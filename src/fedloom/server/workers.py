"""The local engine's workers: how many, where, and how a run's scores are taken with them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom.errors import ConfigError
from fedloom.methods.method import Method, State
from fedloom.model.answers import Answered
from fedloom.model.base import load_base
from fedloom.model.evaluate import Scores
from fedloom.records.config import Config
from fedloom.server.nursery import Order
from fedloom.server.nursery_process import Nursery
from fedloom.server.pool import Pool
from fedloom.server.tasks import Ask, Public, Score, Task, Validate
from fedloom.workspace.assemble import Setup, load_setup


def fill_pool(config: Config, method: Method | None, nursery: Nursery) -> Pool:
    """The workers that [local] asks for.

    Raises ConfigError for a device that there is not, and where the method cannot be told to another process.
    """
    devices = find_devices(config)
    shared = devices == ("cpu",)
    model = config.model.model_copy(update={"device": "cpu" if shared else "cuda"})
    # As many threads for any number of workers: how sums are shared out among threads decides their last bits.
    threads = config.model.threads or torch.get_num_threads()
    order = Order(config.model_copy(update={"model": model}), method, threads, shared)
    return Pool(nursery, order, config.local.count, devices)


def find_devices(config: Config) -> tuple[str, ...]:
    """Where workers are: ("cpu",), or for each GPU what CUDA_VISIBLE_DEVICES is to say."""
    seen = torch.cuda.device_count()
    given = config.local.devices
    if not given:
        given = ("cpu",) if config.model.device == "cpu" or not seen else tuple(f"cuda:{k}" for k in range(seen))
    if set(given) == {"cpu"}:
        return ("cpu",)
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    known = {f"cuda:{k}": names[k] if names != [""] else str(k) for k in range(seen)}
    if "cpu" in given:
        raise ConfigError("local.devices has a CPU and a GPU, which do not give the same bits: name one kind")
    missing = [device for device in given if device not in known]
    if missing:
        raise ConfigError(f"local.devices has {missing[0]!r}; here are {', '.join(['cpu', *known])}")
    return tuple(known[device] for device in given)


@dataclass(frozen=True, eq=False, slots=True)
class PoolJudge:
    """A `Judge` that has the workers score the domains side by side. setup: names them."""

    pool: Pool
    setup: Setup

    def evaluate(self, state: State) -> dict[str, Scores]:
        """Domain → scores on the held-out examples."""
        return self._joined(Score(state, domain) for domain in self.setup.heldout)

    def validate(self, state: State) -> dict[str, Scores]:
        """Domain → scores on the validation examples."""
        return self._joined(Validate(state, domain) for domain in self.setup.validation)

    def public_error(self, state: State, bend: float) -> float:
        """The error on the server's public examples."""
        (ticket,) = self.pool.run([Public(state, bend)])
        error: float = ticket.result()
        return error

    def answer(self, state: State) -> list[Answered]:
        """Answers to a few held-out examples."""
        return [answered for ticket in self.pool.run([Ask(state)]) for answered in ticket.result()]

    def _joined(self, tasks: Iterable[Task]) -> dict[str, Any]:
        return {domain: found for ticket in self.pool.run(tasks) for domain, found in ticket.result().items()}


def load_without_weights(config: Config, method: Method | None, pool: Pool) -> Setup:
    """`load_setup` for a process whose workers have the model: everything is checked, and the weights are let go of."""
    setup = load_setup(config, method, _load_on_cpu)
    if config.model.quantization == "none":  # packed weights cannot be moved
        setup.model.to("meta")
    return replace(setup, judge=PoolJudge(pool, setup), notes=(*setup.notes, *thread_notes(config)))


def thread_notes(config: Config) -> list[str]:
    """That workers on the CPU get into each other's way."""
    cpus, threads = os.cpu_count() or 1, torch.get_num_threads()
    if config.model.threads or threads * config.local.count <= cpus or find_devices(config) != ("cpu",):
        return []
    count = config.local.count
    return [
        f"model.threads is not set: each of {count} workers trains on {threads} threads, as the run would without "
        f"workers, so that the bits are the same; with model.threads = {max(1, cpus // count)} they would not have to "
        f"share {cpus} CPUs"
    ]


def _load_on_cpu(
    path: str, dtype: str, quantization: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_base(path, dtype, quantization, "cpu" if quantization == "none" else device)
