"""Runs without model and data, for what does not depend on them: small modules, and training that adds noise."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import State
from fedloom.model.placement import LinearModule
from fedloom.model.tokens import TokenizedExamples, Tokens
from fedloom.records.config import Config
from fedloom.records.configfile import load_config
from fedloom.records.events import Silent
from fedloom.rounds.step import Train, Trained
from fedloom.server.local import LocalSites
from fedloom.server.loop import Rounds
from fedloom.testbeds import testbed_folder
from fedloom.workspace.assemble import Setup
from fedloom.workspace.clients import LocalClient
from fedloom.workspace.folder import RunFolder
from fedloom.workspace.plan import choose_method, plan_job

SIDE, MODULES = 64, 4
"""The modules are square; four of them."""


class NoisySetup(Setup):
    """A setup without a model, whose training step adds noise."""

    def train(self, client: str, interrupt: Callable[[], None] | None = None) -> Train:
        """Noise on both factors, drawn from the seed."""
        return _add_noise

    def evaluate(self, state: State) -> dict[str, Any]:
        """Nothing is held out."""
        return {}


def _add_noise(state: State, round: int, seed: int) -> Trained:
    draw = torch.Generator().manual_seed(seed)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=draw).mul_(1e-3).add_(tensor)

    return Trained(LoraState({name: LoraPair(moved(p.A), moved(p.B)) for name, p in state.adapter.items()}), 3, 1.0, 1)


def settings(clients: int, attending: int, rounds: int, own: Sequence[str]) -> Config:
    """Those of a run of so many clients, of whom `attending` are asked in a round."""
    asked = [
        "data.partitioner=iid",
        f"federation.num_clients={clients}",
        f"federation.num_rounds={rounds}",
        f"federation.fraction_train={attending / clients}",
        'lora.target_modules=["q_proj"]',
        "federation.eval_every=0",
        "data.heldout=null",
        "output.answers=0",
    ]
    return load_config(testbed_folder() / "demo.toml", [*asked, *own])


def set_up(config: Config, clients: int) -> Setup:
    """What `build_setup` would make of the settings, were there a model of these modules and data for so many."""
    torch.set_num_threads(1)
    linear = {f"layers.{number}.q_proj": LinearModule((SIDE, SIDE)) for number in range(MODULES)}
    names = [f"client-{number:06d}" for number in range(clients)]
    plan = plan_job(linear, config, names, choose_method(config, None))
    examples = TokenizedExamples((Tokens(torch.ones(2, dtype=torch.int64), 1, whole=True),) * 3, 0)
    sites = {name: LocalClient(adapter, examples) for name, adapter in plan.adapters.items()}
    return NoisySetup(config, plan.job, None, plan.shared, plan.initial, sites, None, "made up")  # type: ignore[arg-type]


class TimedRounds(Rounds):
    """Notes the processor's seconds of each round, of what is recorded and saved at its end, and of the delivery; and
    the peak of the resident set, MiB.
    """

    def __init__(self, setup: Setup, folder: RunFolder) -> None:
        super().__init__(setup, folder, Silent(), TimedSites(setup))
        self.costs: list[float] = []
        self.keeping: list[float] = []
        self.peaks: list[float] = []
        self.delivery = 0.0
        self.last = time.process_time()

    def save(self, *, midway: bool = False) -> None:
        """Save: a round ends with it."""
        began = time.process_time()
        super().save(midway=midway)
        now = time.process_time()
        self.costs.append(now - self.last)
        self.keeping.append(now - began)
        self.peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # Linux counts in KiB
        self.last = now


class TimedSites(LocalSites):
    """Notes how long the delivery takes, which is no part of the last round."""

    def deliver(self, rounds: Rounds) -> None:
        """Deliver the result."""
        began = time.process_time()
        super().deliver(rounds)
        if isinstance(rounds, TimedRounds):
            rounds.delivery = time.process_time() - began
            rounds.last += rounds.delivery


def play(config: Config, clients: int, folder: Path) -> tuple[float, TimedRounds, float]:
    """(the processor's seconds up to the first round, the rounds, those of the report): a whole run."""
    began = time.process_time()
    setup = set_up(config, clients)
    with RunFolder.open(folder, config) as run:
        rounds = TimedRounds(setup, run)
        rounds.play(resume=False)
        report = time.process_time() - rounds.last
        return rounds.costs[0] + rounds.last - began - sum(rounds.costs) - rounds.delivery, rounds, report


def median(costs: Sequence[float]) -> float:
    """Of rounds' costs: a neighbour's work in one of them does not show."""
    return statistics.median(costs)
